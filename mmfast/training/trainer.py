"""The one training loop: every objective, on one process or several, broken off and resumed at will."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mmfast.training import checkpoints
from mmfast.training.objective import Loss, Objective
from mmfast.training.optimizers import Muon
from mmfast.training.settings import Settings

LOG = "log.jsonl"

logger = logging.getLogger(__name__)


def train(
    objective: Objective,
    settings: Settings,
    folder: str | Path,
    *,
    resume: bool = True,
    stop_after: int | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Train, and write what was learned to ``folder``.

    The loop runs on `accelerate <https://huggingface.co/docs/accelerate>`_: started by ``accelerate launch`` or
    ``torchrun``, each process takes its share. ``folder`` holds the log (``log.jsonl``, a line each few steps), the
    checkpoints (safetensors and JSON) and, at the end, what the objective exports.

    Args:
        objective: what to learn.
        settings: the numbers of the run.
        folder: where everything is written; it is made.
        resume: go on from the newest checkpoint in ``folder``, if there is one.
        stop_after: break off after so many steps of this call, with a checkpoint, as if the process had been
            stopped; None trains to the end.
        progress: show a progress bar, in the first process.

    Returns:
        The figures of the last line of the log and, at the end, of what was exported.

    Raises:
        ImportError: if ``accelerate`` is missing; the extra ``mmfast[train]`` brings it.
        ValueError: if nothing asks for gradients, the checkpoint belongs to other settings, or the loss is not
            finite where the settings say to stop.
    """
    return _Run(objective, settings, Path(folder), progress=progress).go(resume=resume, stop_after=stop_after)


class _Run:
    """One run of the loop."""

    def __init__(self, objective: Objective, settings: Settings, folder: Path, *, progress: bool) -> None:
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
        except ImportError as error:
            raise ImportError("training needs accelerate; install mmfast[train]") from error
        if not any(p.requires_grad for p in objective.parameters()):
            raise ValueError("no parameter of the objective asks for gradients, so there is nothing to train")
        self.objective, self.settings, self.folder, self.progress = objective, settings, folder, progress
        # Which parts of a mixture take part differs from step to step.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(mixed_precision=settings.precision, kwargs_handlers=[unused])
        optimizer = optimizer_of(objective, settings)
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.wrapped, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.last: dict[str, float] = {}

    def go(self, *, resume: bool, stop_after: int | None) -> dict[str, float]:
        """Train from where the folder stands."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.objective.begin(self.folder, self.accelerator.process_index, self.accelerator.num_processes)
        self.accelerator.wait_for_everyone()
        start = checkpoints.load(self.folder, self.objective, self.optimizer.optimizer, self.settings) if resume else 0
        if self.accelerator.is_main_process:
            checkpoints.cut(self.folder, start)
            self._cut_log(start)
            self.last = next(reversed(read_log(self.folder)), {})
        end = self.settings.steps if stop_after is None else min(self.settings.steps, start + stop_after)
        self.objective.train()
        shown = self.progress and self.accelerator.is_main_process
        seen, since = 0, time.perf_counter()
        for step in tqdm(range(start, end), initial=start, total=self.settings.steps, disable=not shown):
            loss = self._step(step)
            seen += 1
            last = step + 1 in (end, self.settings.steps)
            if (step + 1) % self.settings.log_every == 0 or last:
                self._log(step + 1, loss, seen, time.perf_counter() - since)
                seen, since = 0, time.perf_counter()
            if (step + 1) % self.settings.checkpoint_every == 0 or last:
                self._save(step + 1)
        if end == self.settings.steps and self.accelerator.is_main_process:
            self.objective.eval()
            self.objective.export(self.folder)
            self.last = {**self.last, **self.objective.evaluate(self.folder)}
        self.accelerator.wait_for_everyone()
        return self.last

    def _step(self, step: int) -> Loss:
        settings, world = self.settings, self.accelerator.num_processes
        # Dropout and everything else that is drawn depends on the step, not on what came before it.
        torch.manual_seed((settings.seed * 1_000_003 + step) * world + self.accelerator.process_index)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * settings.rate_at(step)
        self.optimizer.zero_grad()
        losses: list[Loss] = []
        for turn in range(settings.accumulate):
            part = self.accelerator.process_index * settings.accumulate + turn
            batch = self.objective.batch(step, part, world * settings.accumulate, settings.batch // settings.accumulate)
            last = turn + 1 == settings.accumulate
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss: Loss = self.wrapped(batch, step / settings.steps)
                losses.append(loss)
                if not self._usable(loss.total, batch, step):
                    self.optimizer.zero_grad()
                    return loss
                self.accelerator.backward(loss.total / settings.accumulate)
        if settings.clip_value:
            self.accelerator.clip_grad_value_(self.objective.parameters(), settings.clip_value)
        if settings.clip:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), settings.clip)
        self.optimizer.step()
        return _averaged(losses)

    def _usable(self, total: Tensor, batch: Any, step: int) -> bool:
        """Say whether all processes have a finite loss; they go on or stop together."""
        fine = torch.isfinite(total.detach()).all().float()
        if self.accelerator.num_processes > 1:
            fine = self.accelerator.reduce(fine, reduction="mean")
        if float(fine) == 1.0:
            return True
        named = self.objective.describe(batch)
        message = f"step {step}: the loss is not finite{f', for {named}' if named else ''}"
        if self.settings.on_bad == "stop":
            raise ValueError(f"{message}; lower learning_rate, or set on_bad to 'skip'")
        logger.warning("%s; the step is left out", message)
        return False

    def _log(self, step: int, loss: Loss, seen: int, seconds: float) -> None:
        total = loss.total.detach().float()
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, reduction="mean")
        examples = seen * self.settings.batch * self.accelerator.num_processes
        rate = self.settings.rate_at(step - 1) * self.peaks[0]
        speed = examples / max(seconds, 1e-9)
        self.last = {"step": step, "loss": float(total), **loss.figures, "rate": rate, "examples_per_second": speed}
        if self.accelerator.is_main_process:
            with (self.folder / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps({name: _short(value) for name, value in self.last.items()}) + "\n")

    def _cut_log(self, step: int) -> None:
        """Take out what was logged after the checkpoint that the run goes on from."""
        path = self.folder / LOG
        if path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            checkpoints.save(self.folder, step, self.objective, self.optimizer.optimizer, self.settings)
        self.accelerator.wait_for_everyone()


def optimizer_of(objective: Objective, settings: Settings) -> torch.optim.Optimizer:
    """Build the optimizer that the settings ask for, over everything that asks for gradients."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    if settings.optimizer == "adamw":
        groups: list[dict[str, Any]] = [
            {"params": part, "lr": settings.learning_rate * share} for part, share in objective.groups()
        ]
        return torch.optim.AdamW(
            groups, settings.learning_rate, betas=(0.9, settings.adam_beta2), weight_decay=settings.weight_decay
        )
    matrices = objective.matrices()
    chosen = {id(p) for p in matrices}
    return Muon(
        matrices,
        [p for p in trained if id(p) not in chosen],
        rate=settings.learning_rate,
        other_rate=settings.other_rate or settings.learning_rate / 2,
        weight_decay=settings.weight_decay,
    )


def read_log(folder: str | Path) -> list[dict[str, float]]:
    """Read the log of a run, a dictionary per line; empty where there is none."""
    path = Path(folder) / LOG
    lines: Iterator[str] = iter(path.read_text(encoding="utf-8").splitlines() if path.is_file() else ())
    return [json.loads(line) for line in lines]


def _averaged(losses: list[Loss]) -> Loss:
    if len(losses) == 1:
        return losses[0]
    found: dict[str, list[float]] = {}
    for loss in losses:
        for name, value in loss.figures.items():
            found.setdefault(name, []).append(value)
    # A figure may be known of some of the passes only.
    figures = {name: sum(values) / len(values) for name, values in found.items()}
    return Loss(torch.stack([loss.total.detach() for loss in losses]).mean(), figures)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        # A line that was torn when the process was killed.
        return math.inf


def _short(value: float) -> float:
    return float(f"{value:.6g}")
