"""One contender on one model and batch, in turn with the untouched model, against the floors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import mmfast
from mmfast.bench.ceilings import Ceilings
from mmfast.bench.contenders import Case, Contender, Planned, Sample, Untouched, sharing_weights
from mmfast.bench.timing import Spread, interleaved, ratios
from mmfast.measure import setting_of
from mmfast.report import Report

BASELINE = Untouched()
"""What every contender is measured in turn with."""


def default_plans(kept: int) -> tuple[str, ...]:
    """Name the plans that are measured unless others are asked for.

    Args:
        kept: visual tokens to keep.

    Example:
        >>> default_plans(160)[0]
        'divprune(keep=160)'
    """
    return (
        f"divprune(keep={kept})",
        f"fastv(layer=2, keep={kept})",
        "pyramiddrop()",
        "snapkv(keep=0.2)",
        "kivi(bits=2)",
        f"divprune(keep={kept}) + kivi(bits=2)",
    )


def model_cell(
    contender: Contender,
    case: Case,
    *,
    ceilings: Ceilings,
    new_tokens: int,
    repeats: int,
    seconds: float,
) -> dict[str, Any]:
    """Measure one contender against the untouched model.

    Args:
        contender: what is measured.
        case: the model and the prompt; its model is not touched.
        ceilings: what the device can do.
        new_tokens: tokens of each answer.
        repeats: counted rounds.
        seconds: most that they should take.

    Returns:
        Plain values: of both sides the seconds to the first token and per token after it, tokens per second, peak
        memory and shares of the floors; and how many times faster the contender is, round by round.

    Raises:
        RuntimeError: if the untouched model itself could not run.
    """
    described = _untouched_report(case)
    sides = {BASELINE.name: _watched(BASELINE, case, new_tokens)}
    if contender.name != BASELINE.name:
        sides[contender.name] = _watched(contender, case, new_tokens)
    with torch.inference_mode():
        # What is compiled records its graphs in the runs after the first.
        warm_ups = 3 if getattr(contender, "compiled", False) else 1
        found, left_out = interleaved(sides, repeats=repeats, seconds=seconds, warm_ups=warm_ups)
    if BASELINE.name not in found:
        raise RuntimeError(f"the untouched model could not run: {left_out[BASELINE.name]}")
    base = found[BASELINE.name]
    result: dict[str, Any] = {
        "model": case.name,
        "batch": case.batch,
        "contender": contender.name,
        "baseline": BASELINE.name,
        "setting": setting_of(case.model, case.inputs),
        "visual_tokens": described.visual_tokens // case.batch,
        "prompt_tokens": int(case.inputs["input_ids"].shape[1]),
        "new_tokens": new_tokens,
        "vision_seconds": described.seconds["vision"],
        "sides": {},
        "left_out": left_out,
    }
    for name, samples in found.items():
        report = samples[-1].report or described
        result["sides"][name] = _side(base, samples, report, case, ceilings, described.seconds["vision"], new_tokens)
    return result


def _untouched_report(case: Case) -> Report:
    """Count tokens and operations of the untouched model, and the seconds of its vision encoder."""
    with torch.inference_mode(), mmfast.accelerate(case.model, "full") as fast:
        for _ in range(2):
            case.model.generate(**case.inputs, max_new_tokens=1, do_sample=False)  # type: ignore[operator]
        return fast.report()


def _watched(contender: Contender, case: Case, new_tokens: int) -> Callable[[], Sample]:
    """Start a contender on a model of its own at its first run, and watch its memory."""
    watch = _Memory(case)
    run: list[Callable[[], Sample]] = []

    def sample() -> Sample:
        with watch:
            if not run:
                own = replace(case, model=sharing_weights(case.model))
                run.append(contender.start(own, new_tokens))
            found = run[0]()
        return replace(found, peak_bytes=watch.peak)

    return sample


class _Memory:
    """The most memory one side would hold if it were alone: the weights, what it keeps between runs, and the run."""

    def __init__(self, case: Case) -> None:
        self._device = case.device
        self._weights = sum(tensor.numel() * tensor.element_size() for tensor in case.model.parameters())
        self._kept = 0
        self.peak = 0

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    def __exit__(self, *details: object) -> None:
        if self._device.type == "cuda":
            self.peak = self._weights + self._kept + torch.cuda.max_memory_allocated(self._device) - self._before
            self._kept += torch.cuda.memory_allocated(self._device) - self._before


def _side(
    base: Sequence[Sample],
    samples: Sequence[Sample],
    report: Report,
    case: Case,
    ceilings: Ceilings,
    vision: float,
    new_tokens: int,
) -> dict[str, Any]:
    first, step = [one.first_token for one in samples], [one.per_token for one in samples]
    middle_first, middle_step = Spread.of(first).median, Spread.of(step).median
    prefill_floor = ceilings.prefill_seconds(report.flops)
    # On average half of the answer is in the cache too.
    grown = case.batch * report.shape.kv_bytes([new_tokens // 2] * report.shape.layers, report.kv_value_bytes)
    decode_floor = ceilings.decode_seconds(decode_weight_bytes(case.model), report.kv_bytes + grown)
    faster = ratios([one.first_token for one in base], first)
    # Reports count by the clock on the wall, which on a CPU is not the one of this measurement.
    apart = vision if case.device.type == "cuda" else 0.0
    alone = ratios([one.first_token - apart for one in base], [max(1e-9, value - apart) for value in first])
    decoding = ratios([one.per_token for one in base], step)
    total = ratios(_totals(base, new_tokens), _totals(samples, new_tokens))
    return {
        "first_token": Spread.of(first).to_dict(),
        "per_token": Spread.of(step).to_dict(),
        "tokens_per_second": case.batch / middle_step if middle_step else 0.0,
        "peak_bytes": max(one.peak_bytes for one in samples),
        "entered_tokens": report.entered_tokens // case.batch,
        "kv_bytes": report.kv_bytes,
        "prefill_floor": prefill_floor,
        "share_of_prefill_floor": prefill_floor / middle_first,
        "decode_floor": decode_floor,
        "share_of_decode_floor": decode_floor / middle_step if middle_step else 0.0,
        "faster_first_token": faster.to_dict(),
        **({"faster_without_vision": alone.to_dict()} if apart else {}),
        "faster_per_token": decoding.to_dict(),
        "faster_total": total.to_dict(),
        "slower": total.median < 1.0,
    }


def _totals(samples: Sequence[Sample], new_tokens: int) -> list[float]:
    return [one.first_token + (new_tokens - 1) * one.per_token for one in samples]


def decode_weight_bytes(model: nn.Module) -> int:
    """Count the bytes of the weights that a decode step reads: the decoder's and those that make logits.

    Of the embeddings only a row is read, and nothing of the vision encoder.

    Args:
        model: a model with ``get_decoder``, ``get_input_embeddings`` and ``get_output_embeddings``.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    decoder = {id(one): one for one in model.get_decoder().parameters()}  # type: ignore[operator]
    decoder.pop(id(embeddings.weight), None)
    if head is not None:
        decoder[id(head.weight)] = head.weight
    return sum(one.numel() * one.element_size() for one in decoder.values())


def contenders_of(
    kept: int, plans: Sequence[str], *, flash: bool, compiled: bool, more: Sequence[Contender] = ()
) -> list[Contender]:
    """List what is measured on one model.

    Args:
        kept: visual tokens that the plans keep by default.
        plans: plans in text form; empty = :func:`default_plans`.
        flash: whether the flash-attention package is there.
        compiled: whether plans can be compiled.
        more: contenders from runner files.
    """
    wanted = plans or default_plans(kept)
    found: list[Contender] = [Planned(mmfast.Plan.of(plan).to_text()) for plan in wanted]
    if compiled:
        found += [Planned("full", compiled=True), Planned(f"divprune(keep={kept})", compiled=True)]
    if flash:
        found.append(Untouched("flash_attention_2"))
    return [*found, Untouched("eager", reads_attention=True), *more]
