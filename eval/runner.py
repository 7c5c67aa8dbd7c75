"""The one loop that asks a model the questions of a task under a plan, scores and measures."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmfast
from mmfast.eval.loading import Prompt, batches, error_text, prepare_prompts, select
from mmfast.eval.records import Header, Record, plain_text
from mmfast.eval.task import Sample, Task
from mmfast.measure import timed_generate
from mmfast.zoo import embedded_name

WARMUP = 3
"""Runs of each plan before the first that is timed."""

_SAMPLED_VALUES = 64


@dataclass(frozen=True)
class Answered:
    """What one call of ``generate`` gave.

    Attributes:
        tokens: int64 ``[B, T]``, the new tokens.
        report: what the plan did to the prompt; None for text alone.
        costs: times and memory, as fields of a record.
    """

    tokens: Tensor
    report: mmfast.Report | None
    costs: dict[str, Any]


class Runner:
    """A model under evaluation, and how it is asked. Answers are greedy.

    Args:
        model: an unmodified vision-language model.
        processor: its processor.
        name: what the results call it; None takes the name of an embedded model, or the last part of where it
            came from.
        batch: questions answered at once; only batches of one are timed.
        max_new_tokens: tokens an answer may have; None leaves it to the task.
        frames: frames taken from a video file.

    Raises:
        ValueError: if a number is below 1.

    Example:
        >>> from mmfast.eval.datasets import task
        >>> runner = Runner(*mmfast.load_default())
        >>> shapes = task("shapes-image", num_questions=2)
        >>> [(r.n_visual_kept, r.score) for r in runner.records(shapes, "divprune(keep=64)", list(shapes.samples()))]
        [(64, 1.0), (64, 1.0)]
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        name: str | None = None,
        batch: int = 1,
        max_new_tokens: int | None = None,
        frames: int = 8,
    ) -> None:
        for field, value in (("batch", batch), ("max_new_tokens", max_new_tokens), ("frames", frames)):
            if value is not None and value < 1:
                raise ValueError(f"{field}={value} must be at least 1")
        self.model = model
        self.processor = processor
        source = Path(str(getattr(model.config, "_name_or_path", "")))
        # Of a folder only its name: where it lies differs between the machines of one evaluation.
        self.name = name or embedded_name(source) or source.name or type(model).__name__
        self.batch = batch
        self.max_new_tokens = max_new_tokens
        self.frames = frames
        self._weights = ""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def header(self, task: Task, plan: str) -> Header:
        """Describe what a results file of this task and plan holds."""
        dtype = next(self.model.parameters()).dtype
        self._weights = self._weights or fingerprint(self.model)
        return Header(
            task=task.name,
            task_version=task.version,
            task_options=task_options(task),
            metric=task.metric,
            chance=task.chance,
            plan=plan,
            model=self.name,
            weights=self._weights,
            dtype=str(dtype).removeprefix("torch."),
            max_new_tokens=self.max_new_tokens or task.max_new_tokens,
            batch=self.batch,
            frames=self.frames,
            warmup=WARMUP if self.batch == 1 else 0,
            versions=versions(),
            hardware=hardware(self.model),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def prompts(self, samples: Sequence[Sample]) -> list[Prompt]:
        """Read media and write prompts; a sample that cannot be prepared gives a prompt with an error."""
        dtype = next(self.model.parameters()).dtype
        return prepare_prompts(self.processor, samples, frames=self.frames, device=self.device, dtype=dtype)

    def records(self, task: Task, plan: str, samples: Sequence[Sample]) -> Iterator[Record]:
        """Answer samples of one kind under one plan.

        Raises:
            ValueError: if the plan does not suit the model.
        """
        yield from self.answer(task, plan, self.prompts(samples))

    def answer(self, task: Task, plan: str, prompts: Sequence[Prompt]) -> Iterator[Record]:
        """Answer prepared prompts under one plan; a question that fails gives a record that says why.

        Raises:
            ValueError: if the plan does not suit the model.
        """
        with mmfast.accelerate(self.model, plan) as fast:
            for prompt in prompts:
                yield from self._answer(task, fast, prompt)

    def reports(self, plan: str, prompts: Sequence[Prompt]) -> list[mmfast.Report | None]:
        """Run prompts without scoring, to warm up or to see what a plan leaves of them; None where one fails.

        Raises:
            ValueError: if the plan does not suit the model.
        """
        found: list[mmfast.Report | None] = []
        with mmfast.accelerate(self.model, plan) as fast, torch.inference_mode():
            for prompt in prompts:
                try:
                    # Two tokens, so that decoding is warm too.
                    self.model.generate(**prompt.inputs, max_new_tokens=2, do_sample=False)  # type: ignore[operator]
                except Exception:
                    # The same question will fail again where its error is kept.
                    found.append(None)
                else:
                    found.append(fast.report())
        return found

    def _answer(self, task: Task, fast: mmfast.Accelerated, prompt: Prompt) -> Iterator[Record]:
        samples = prompt.samples
        if prompt.error:
            yield failed(task, samples[0], prompt.error)
            return
        try:
            done = self._generate(task, fast, prompt)
        except Exception as error:
            # One long question must not take the rest of its batch along; its memory goes with the traceback.
            reason = error_text(error)
        else:
            texts = self.processor.batch_decode(done.tokens, skip_special_tokens=True)
            for row, (sample, text) in enumerate(zip(samples, texts, strict=True)):
                yield self._record(task, sample, text, done, row, prompt.preprocess_ms)
            return
        if len(samples) == 1:
            yield failed(task, samples[0], reason)
            return
        for sample in samples:
            for alone in self.prompts([sample]):
                yield from self._answer(task, fast, alone)

    @torch.inference_mode()
    def _generate(self, task: Task, fast: mmfast.Accelerated, prompt: Prompt) -> Answered:
        limit = self.max_new_tokens or task.max_new_tokens
        device, size = self.device, len(prompt.samples)
        held = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        if self.batch > 1:
            # Also what is left over at the end: timed and untimed questions would not be comparable.
            begin = time.perf_counter()
            output = self.model.generate(**prompt.inputs, max_new_tokens=limit, do_sample=False)  # type: ignore[operator]
            tokens = output[:, prompt.inputs["input_ids"].shape[1] :].cpu()
            elapsed = time.perf_counter() - begin
            return Answered(tokens, shown(fast.report(), prompt), {"e2e_ms": 1e3 * elapsed / size})
        timing, tokens = timed_generate(self.model, prompt.inputs, limit)
        costs: dict[str, Any] = {
            "ttft_ms": 1e3 * timing.first_token,
            "e2e_ms": 1e3 * timing.total,
            "decode_tok_s": 1 / timing.per_token if timing.new_tokens > 1 and timing.per_token > 0 else None,
        }
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            costs |= {"peak_memory_bytes": peak, "peak_above_weights_bytes": peak - held}
        last = fast.report()
        if last.drafting is not None:
            costs["tokens_per_forward"] = last.drafting.tokens_per_forward
        report = shown(last, prompt)
        if report is not None:
            costs |= {
                "encoder_ms": 1e3 * report.seconds["vision"],
                "reduce_ms": 1e3 * report.seconds["selection"],
                "prefill_ms": 1e3 * report.seconds["prefill"],
                "kv_bytes": report.kv_bytes,
                "full_kv_bytes": report.full_kv_bytes,
            }
        return Answered(tokens.cpu(), report, costs)

    def _record(self, task: Task, sample: Sample, text: str, done: Answered, row: int, preprocess_ms: float) -> Record:
        try:
            scored = task.score(sample, text)
        except Exception as error:
            return replace(failed(task, sample, f"the scorer failed: {error_text(error)}"), prediction=text)
        return replace(
            blank(task, sample),
            prediction=text,
            parsed=scored.parsed,
            score=float(scored.score),
            scored_details=dict(scored.details),
            n_new=self._length(done.tokens[row]),
            preprocess_ms=preprocess_ms,
            **done.costs,
            **({} if done.report is None else counts(done.report, row)),
        )

    def _length(self, tokens: Tensor) -> int:
        """Count the tokens of one answer, the end sign included and padding not."""
        ends = self.model.generation_config.eos_token_id  # type: ignore[union-attr]
        if ends is None:
            return len(tokens)
        ending = torch.isin(tokens, torch.tensor(ends)).nonzero()
        return int(ending[0]) + 1 if len(ending) else len(tokens)


def evaluate_shard(
    model: nn.Module,
    processor: Any,
    task: Task,
    plan: mmfast.Plan | str = "full",
    *,
    limit: int | None = None,
    seed: int | None = None,
    shard: tuple[int, int] = (0, 1),
    batch: int = 1,
    max_new_tokens: int | None = None,
    frames: int = 8,
) -> Iterator[Record]:
    """Answer one shard of a task under one plan, and yield a record for each question.

    Nothing is written; :func:`~mmfast.eval.sweep.evaluate` compares plans and keeps results on disk.

    Args:
        model: an unmodified vision-language model.
        processor: its processor.
        task: the data set.
        plan: the plan, as text or object.
        limit: questions in all shards together; None for all.
        seed: draw them by lot; None takes the first ones.
        shard: number of the shard from 0, and how many there are.
        batch: questions answered at once; only batches of one are timed.
        max_new_tokens: tokens an answer may have; None leaves it to the task.
        frames: frames taken from a video file.

    Raises:
        ValueError: if a number is out of range or the plan does not suit the model.

    Example:
        >>> from mmfast.eval.datasets import task
        >>> model, processor = mmfast.load_default()
        >>> [record.parsed for record in evaluate_shard(model, processor, task("shapes-image"), limit=2)]
        ['no', 'purple']
    """
    runner = Runner(model, processor, batch=batch, max_new_tokens=max_new_tokens, frames=frames)
    text = mmfast.Plan.of(plan).to_text()
    for group in batches(select(task, limit=limit, seed=seed, shard=shard), batch):
        yield from runner.records(task, text, group)


def blank(task: Task, sample: Sample) -> Record:
    """Return the record of a question that has no answer yet."""
    return Record(
        question_id=sample.sample_id,
        task=task.name,
        prediction="",
        parsed="",
        answers=sample.answers,
        score=0.0,
        question=sample.question,
        category=sample.category,
        cluster=sample.cluster,
        choices=sample.choices,
        sample_details=dict(sample.details),
    )


def failed(task: Task, sample: Sample, reason: str) -> Record:
    """Return the record of a question that failed: it counts, as wrong.

    The scorer sees an empty answer, because summaries may rest on what else it says of a wrong one.
    """
    try:
        scored = task.score(sample, "")
    except Exception:
        return replace(blank(task, sample), error=reason)
    return replace(blank(task, sample), scored_details=dict(scored.details), error=reason)


def shown(report: mmfast.Report, prompt: Prompt) -> mmfast.Report | None:
    """Return the report of a prompt; of text alone there is none, and the last one is of another prompt."""
    shows = any(sample.images or sample.frames or sample.video for sample in prompt.samples)
    return report if shows and report.media else None


def counts(report: mmfast.Report, row: int) -> dict[str, Any]:
    """Return tokens and multiply-accumulates of one row of a batch, as fields of a record."""
    own = (
        report
        if len(report.text_tokens) == 1
        else replace(
            report,
            media=[replace(item, row=0) for item in report.media if item.row == row],
            text_tokens=[report.text_tokens[row]],
            work=[report.work[row]],
        )
    )
    macs = own.flops
    return {
        "n_visual_in": own.visual_tokens,
        "n_visual_kept": own.entered_tokens,
        "n_visual_left": sum(item.left for item in own.media),
        "n_visual_layer_average": own.layer_average,
        "n_text": own.text_tokens[0],
        "prefill_macs": macs,
        "prefill_flops": 2 * macs,
        "full_prefill_macs": own.full_flops,
    }


def task_options(task: Task) -> dict[str, Any]:
    """Return the options of a task as a file holds them; its folder is left out, for it differs between machines."""
    options = {item.name: getattr(task, item.name) for item in fields(task) if item.init and item.name != "root"}
    found: dict[str, Any] = json.loads(json.dumps(options, default=plain_text))
    return found


def fingerprint(model: nn.Module) -> str:
    """Return a text that differs for other weights: names, shapes and some values of every tensor.

    Reading all values of a large model would take longer than many an evaluation.

    Example:
        >>> one, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> fingerprint(one) == fingerprint(one), fingerprint(one) == fingerprint(other)
        (True, False)
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)]
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        # As float32, because NumPy knows no bfloat16.
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@cache
def versions() -> dict[str, str]:
    """Name the software whose release can change a figure."""
    found = {name: version(name) for name in ("mmfast", "torch", "transformers")}
    return {"python": platform.python_version(), **found}


def hardware(model: nn.Module) -> dict[str, str | int]:
    """Name what times depend on: device, threads, attention backend."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "attention": str(getattr(model.config, "_attn_implementation", "unknown")),
    }
