"""The full model and several plans on one prompt: answers, tokens, times, bytes and agreement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.accelerated import accelerate
from mmfast.measure import agreement, in_turn, setting_of
from mmfast.plan import Plan, PlanLike
from mmfast.report import Comparison, Report, Timing


@dataclass(frozen=True)
class PlanRun:
    """One plan of a comparison; the first of a list is the full model.

    Attributes:
        plan: the plan in text form, ``"full"`` for the untouched model.
        timing: the run of median total.
        report: tokens, FLOPs and bytes.
        new_tokens: int64 ``[B, T]``, what was generated.
        agreement: share of generated tokens equal to the full model's, position by position.
        peak_bytes: most memory the device held during this plan's runs; 0 on the CPU, where the process
            has one high-water mark that cannot tell plans apart.
    """

    plan: str
    timing: Timing
    report: Report
    new_tokens: Tensor
    agreement: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tokens as plain values, for JSON."""
        return {
            "plan": self.plan,
            "prefill_seconds": self.timing.first_token,
            "decode_tokens_per_second": decode_speed(self.timing),
            "total_seconds": self.timing.total,
            "new_tokens": self.timing.new_tokens,
            "agreement": self.agreement,
            "peak_bytes": self.peak_bytes,
            "report": self.report.to_dict(),
        }


@dataclass(frozen=True)
class PlanComparison:
    """Several plans side by side.

    Attributes:
        runs: one per plan, the full model first.
        setting: attention backend, dtype, device, batch and prompt length.
        repeats: counted runs of each plan.
    """

    runs: tuple[PlanRun, ...]
    setting: str
    repeats: int

    def pairs(self) -> list[Comparison]:
        """Hold each plan against the full model."""
        full = self.runs[0]
        return [Comparison(full.timing, run.timing, self.repeats, self.setting, run.agreement) for run in self.runs[1:]]

    def verdicts(self) -> list[str]:
        """Say of each plan, plainly, whether it paid; the setting is told by :attr:`setting`."""
        return [
            f"{run.plan}: {pair.verdict(with_setting=False)}"
            for run, pair in zip(self.runs[1:], self.pairs(), strict=True)
        ]


def decode_speed(timing: Timing) -> float:
    """Return generated tokens per second after the first one; 0 where there was none.

    Example:
        >>> decode_speed(Timing(first_token=1.0, per_token=0.1, total=2.0, new_tokens=11))
        10.0
    """
    return 1.0 / timing.per_token if timing.per_token > 0 and timing.new_tokens > 1 else 0.0


def compare_plans(
    model: nn.Module,
    plans: Sequence[PlanLike],
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int = 32,
    repeats: int = 3,
    after_run: Callable[[str], None] | None = None,
) -> PlanComparison:
    """Run the full model and each plan in turn on the same inputs; the model encodes the media each time.

    Args:
        model: an unmodified vision-language model.
        plans: the plans; the full model is always run and need not be named.
        inputs: what the processor returned.
        max_new_tokens: tokens to generate, greedily.
        repeats: counted runs of each, after one warm-up; medians are reported.
        after_run: called with the plan's text after every run, for progress.

    Returns:
        The runs, the full model first.

    Raises:
        ValueError: if a plan does not suit the model; nothing has been run then.

    Example:
        >>> import mmfast
        >>> from PIL import Image
        >>> from mmfast.adapters import prepare
        >>> model, processor = mmfast.load_default()
        >>> inputs = prepare(processor, "what color is the star?", Image.new("RGB", (64, 64)))
        >>> result = compare_plans(model, ["uniform(keep=64)"], inputs, max_new_tokens=2, repeats=1)
        >>> [run.report.entered_tokens for run in result.runs]
        [256, 64]
    """
    named = {plan.to_text(): plan for plan in (Plan(), *map(Plan.of, plans))}
    for plan in named.values():
        accelerate(model, plan).remove()
    device = next(model.parameters()).device
    reports: dict[str, Report] = {}
    peaks: dict[str, int] = dict.fromkeys(named, 0)

    def entering(name: str) -> Callable[[], AbstractContextManager[Any]]:
        # The full model is timed untouched; only its warm-up carries the hooks that count tokens.
        def enter() -> AbstractContextManager[Any]:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            return nullcontext() if name == "full" and name in reports else _reporting(name)

        return enter

    def _reporting(name: str) -> AbstractContextManager[Any]:
        return _Noted(accelerate(model, named[name]), name, reports)

    def finished(name: str) -> None:
        if device.type == "cuda":
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device))
        if after_run is not None:
            after_run(name)

    runs = in_turn(
        model,
        {name: entering(name) for name in named},
        inputs,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        after_run=finished,
    )
    full_tokens = runs["full"][1]
    return PlanComparison(
        tuple(
            PlanRun(name, timing, reports[name], tokens, agreement(full_tokens, tokens), peaks[name])
            for name, (timing, tokens) in runs.items()
        ),
        setting_of(model, inputs),
        repeats,
    )


class _Noted:
    """Keep the report of an accelerated run when its context ends."""

    def __init__(self, fast: Any, name: str, reports: dict[str, Report]) -> None:
        self._fast, self._name, self._reports = fast, name, reports

    def __enter__(self) -> Any:
        return self._fast

    def __exit__(self, *details: object) -> None:
        self._fast.remove()
        self._reports[self._name] = self._fast.report()
