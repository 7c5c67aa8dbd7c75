"""The one training loop: every objective, on one process or several, broken off and resumed at will."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmfast.training import checkpoints
from mmfast.training.objective import BadExample, Loss, Objective
from mmfast.training.optimizers import Muon
from mmfast.training.settings import Settings

LOG = "log.jsonl"
_PATIENCE = timedelta(hours=6)

logger = logging.getLogger(__name__)


def train(
    objective: Objective,
    settings: Settings,
    folder: str | Path,
    *,
    about: Mapping[str, Any] | None = None,
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
        about: what else decides how the run goes, such as its data, by name and as JSON can hold it. It is kept with
            the checkpoints, and one that tells of something else is refused.
        resume: go on from the newest checkpoint in ``folder``, if there is one.
        stop_after: break off after so many steps of this call, with a checkpoint, as if the process had been
            stopped; None trains to the end.
        progress: show a progress bar, in the first process.

    Returns:
        The figures of the last line of the log and, at the end, of what was exported; whole in the first process alone.

    Raises:
        ImportError: if ``accelerate`` is missing; the extra ``mmfast[train]`` brings it.
        ValueError: if nothing asks for gradients, the checkpoint belongs to another run or another number of
            processes, the processes do not share the folder, or the loss is not finite where the settings say to stop.
    """
    run = _Run(objective, settings, Path(folder), about or {}, progress=progress)
    return run.go(resume=resume, stop_after=stop_after)


class _Run:
    """One run of the loop."""

    def __init__(
        self, objective: Objective, settings: Settings, folder: Path, about: Mapping[str, Any], *, progress: bool
    ) -> None:
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
        except ImportError as error:
            raise ImportError("training needs accelerate; install mmfast[train]") from error
        if not any(p.requires_grad for p in objective.parameters()):
            raise ValueError("no parameter of the objective asks for gradients, so there is nothing to train")
        self.objective, self.settings, self.folder, self.progress = objective, settings, folder, progress
        # Which parts of a mixture take part differs from step to step.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        # The others wait while the first process exports and measures, or one of them writes the longest answers.
        patient = InitProcessGroupKwargs(timeout=_PATIENCE)
        self.accelerator = Accelerator(mixed_precision=settings.precision, kwargs_handlers=[unused, patient])
        # As a checkpoint will give it back: a tuple becomes a list.
        self.about = json.loads(json.dumps({**about, "processes": self.accelerator.num_processes}))
        optimizer = optimizer_of(objective, settings)
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.wrapped, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.last: dict[str, float] = {}

    def go(self, *, resume: bool, stop_after: int | None) -> dict[str, float]:
        """Train from where the folder stands."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.objective.begin(self.folder, self.accelerator.process_index, self.accelerator.num_processes)
        self.accelerator.wait_for_everyone()
        start = self._found() if resume else 0
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

    def _found(self) -> int:
        """Read the newest checkpoint, which must be the same for all processes, and return its step."""
        start = checkpoints.load(self.folder, self.objective, self.optimizer.optimizer, self.settings, self.about)
        if self.accelerator.num_processes > 1:
            found = self.accelerator.gather(torch.tensor([start], device=self.accelerator.device)).tolist()
            if len(set(found)) > 1:
                listed = ", ".join(str(step) for step in found)
                raise ValueError(
                    f"the processes found checkpoints of steps {listed} in {self.folder}; give a folder that all of "
                    "them share"
                )
        return start

    def _step(self, step: int) -> Loss:
        settings, world = self.settings, self.accelerator.num_processes
        count = settings.accumulate
        # Dropout and everything else that is drawn depends on the step, not on what came before it.
        torch.manual_seed((settings.seed * 1_000_003 + step) * world + self.accelerator.process_index)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * settings.rate_at(step)
        self.optimizer.zero_grad()
        batches, weights = self._batches(step)
        if not batches:
            return Loss(torch.tensor(math.nan, device=self.accelerator.device))
        losses: list[Loss] = []
        for turn, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            last = turn + 1 == count
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss: Loss = self.wrapped(batch, step / settings.steps)
                losses.append(loss)
                if not self._all(bool(torch.isfinite(loss.total.detach()).all())):
                    self._refuse_loss(step, batch)
                    self.optimizer.zero_grad()
                    return loss
                # The gradients of the processes are averaged, so that the shares of one add up to its part of all.
                self.accelerator.backward(loss.total * (weight * world))
        if settings.clip_value:
            self.accelerator.clip_grad_value_(self.objective.parameters(), settings.clip_value)
        if settings.clip:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), settings.clip)
        self.optimizer.step()
        return _averaged(losses, weights)

    def _batches(self, step: int) -> tuple[list[Any], list[float]]:
        """Make this process's batches of a step, and the share of the step that each is; none if one is bad."""
        count, world = self.settings.accumulate, self.accelerator.num_processes
        first, batches, fine = self.accelerator.process_index * count, [], True
        try:
            for part in range(first, first + count):
                batches.append(self.objective.batch(step, part, world * count, self.settings.batch // count))
        except BadExample as error:
            if self.settings.on_bad == "stop":
                raise
            logger.warning("%s; step %d is left out", error, step)
            fine = False
        if not self._all(fine):
            return [], []
        weights = [self.objective.weight(batch) for batch in batches]
        total = sum(weights)
        if world > 1:
            total = float(self.accelerator.reduce(torch.tensor(total, device=self.accelerator.device), "sum"))
        return batches, [weight / (total or 1.0) for weight in weights]

    def _all(self, fine: bool) -> bool:
        """Say whether all processes can go on; they do, or stop, together."""
        if self.accelerator.num_processes == 1:
            return fine
        agreed = self.accelerator.reduce(torch.tensor(float(fine), device=self.accelerator.device), "mean")
        return float(agreed) == 1.0

    def _refuse_loss(self, step: int, batch: Any) -> None:
        """Stop, or warn, because of a loss that is not finite."""
        named = self.objective.describe(batch)
        message = f"step {step}: the loss is not finite{f', for {named}' if named else ''}"
        if self.settings.on_bad == "stop":
            raise ValueError(f"{message}; lower learning_rate, or set on_bad to 'skip'")
        logger.warning("%s; the step is left out", message)

    def _log(self, step: int, loss: Loss, seen: int, seconds: float) -> None:
        total = loss.total.detach().float()
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        examples = seen * self.settings.batch * self.accelerator.num_processes
        rate = self.settings.rate_at(step - 1) * self.peaks[0]
        speed = examples / max(seconds, 1e-9)
        self.last = {"step": step, "loss": float(total), **loss.figures, "rate": rate, "examples_per_second": speed}
        if self.accelerator.is_main_process:
            with (self.folder / LOG).open("a", encoding="utf-8") as log:
                line = {name: finite(float(f"{value:.6g}")) for name, value in self.last.items()}
                log.write(json.dumps(line, allow_nan=False) + "\n")

    def _cut_log(self, step: int) -> None:
        """Take out what was logged after the checkpoint that the run goes on from."""
        path = self.folder / LOG
        if path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            optimizer = self.optimizer.optimizer
            checkpoints.save(self.folder, step, self.objective, optimizer, self.settings, self.about)
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
    if any(share != 1.0 for _, share in objective.groups()):
        raise ValueError("optimizer='muon' has one rate for all matrices; leave model_rate at 1, or take adamw")
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
    """Read the log of a run, a dictionary per line, nan for what is not finite; empty where there is no log."""
    path = Path(folder) / LOG
    lines: Iterator[str] = iter(path.read_text(encoding="utf-8").splitlines() if path.is_file() else ())
    found = [json.loads(line) for line in lines]
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in found]


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it: None if it is not finite.

    Example:
        >>> finite(0.5), finite(math.nan)
        (0.5, None)
    """
    return value if math.isfinite(value) else None


def _averaged(losses: list[Loss], weights: list[float]) -> Loss:
    """Return what a process adds to the loss of a step, and the means of its figures."""
    if len(losses) == 1:
        return Loss(losses[0].total.detach() * weights[0], losses[0].figures)
    found: dict[str, list[tuple[float, float]]] = {}
    for loss, weight in zip(losses, weights, strict=True):
        for name, value in loss.figures.items():
            found.setdefault(name, []).append((value, weight))
    # A figure may be known of some of the passes only.
    figures = {name: sum(v * w for v, w in pairs) / sum(w for _, w in pairs) for name, pairs in found.items()}
    totals = torch.stack([loss.total.detach() * weight for loss, weight in zip(losses, weights, strict=True)])
    return Loss(totals.sum(), figures)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        # A line that was torn when the process was killed.
        return math.inf
