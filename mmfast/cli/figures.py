"""The figures of a comparison as text: one source for the terminal, the page and JSON."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from mmfast.compare import PlanComparison, PlanRun, decode_speed
from mmfast.report import peak_memory


@dataclass(frozen=True)
class Figure:
    """One quantity of every plan.

    Attributes:
        label: what it is.
        unit: in what it is measured; may be empty.
        values: its value for each plan, as text; ``-`` where there is none.
        shares: the same as a share of the full model's, or empty texts.
    """

    label: str
    unit: str
    values: tuple[str, ...]
    shares: tuple[str, ...]


_QUANTITIES: tuple[tuple[str, str, int, Callable[[PlanRun], float]], ...] = (
    ("visual tokens into the LLM", "", 0, lambda run: run.report.entered_tokens),
    ("per layer, average", "", 0, lambda run: run.report.layer_average),
    ("time to first token", "ms", 1, lambda run: 1e3 * run.timing.first_token),
    ("decoding", "tokens/s", 0, lambda run: decode_speed(run.timing)),
    ("end to end", "s", 3, lambda run: run.timing.total),
    ("KV cache", "MB", 2, lambda run: run.report.kv_bytes / 1e6),
    ("LLM prefill", "GMAC", 2, lambda run: run.report.flops / 1e9),
    ("peak memory", "MB", 0, lambda run: run.peak_bytes / 1e6),
)


def figures(result: PlanComparison) -> list[Figure]:
    """Write every quantity that was measured; the full model comes first and is the measure of the shares."""
    found = []
    for label, unit, digits, measure in _QUANTITIES:
        values = [measure(run) for run in result.runs]
        if not any(values):
            continue
        shares = [f"{value / values[0]:.0%}" if values[0] and value else "" for value in values[1:]]
        texts = tuple(f"{value:.{digits}f}" if value else "-" for value in values)
        found.append(Figure(label, unit, texts, ("", *shares)))
    agreements = tuple(f"{run.agreement:.0%}" for run in result.runs)
    found.append(Figure("tokens equal to the full model's", "", agreements, ("",) * len(agreements)))
    return found


def memory_note(result: PlanComparison) -> str:
    """Say what is known of memory."""
    if _peaks_known(result):
        return "Peak memory is the most the device held during each plan's runs, weights included."
    return (
        f"Process peak so far: {_process_peak() / 1e6:.0f} MB. On a CPU this mark never falls, so it is one figure for "
        "all plans and says nothing about any of them."
    )


def _peaks_known(result: PlanComparison) -> bool:
    return any(run.peak_bytes for run in result.runs)


def _process_peak() -> int:
    return peak_memory(torch.device("cpu"))


def versions() -> dict[str, str]:
    """Name the software whose release can change a figure."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("mmfast", "torch", "transformers")},
    }


def as_json(result: PlanComparison, answers: Sequence[str], question: str) -> dict[str, Any]:
    """Return the comparison as plain values; memory is named per plan only where it can be told apart."""
    found: dict[str, Any] = {
        "question": question,
        "setting": result.setting,
        "repeats": result.repeats,
        "versions": versions(),
        "verdicts": result.verdicts(),
        "runs": [{**run.to_dict(), "answer": answer} for run, answer in zip(result.runs, answers, strict=True)],
    }
    for run in found["runs"]:
        run["report"].pop("peak_bytes")
        if not _peaks_known(result):
            run.pop("peak_bytes")
    if not _peaks_known(result):
        found["process_peak_bytes"] = _process_peak()
    return found
