"""What mmfast should reach on a GPU, and whether results show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["reached", "missed", "not measured"]


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        text: what is to be reached.
        cell: the cell that shows it.
        path: names that lead to the figure in the cell, parted by slashes; two such paths parted by a colon mean the
            first divided by the second.
        limit: the figure to reach.
        at_most: whether less is better.
    """

    text: str
    cell: str
    path: str
    limit: float
    at_most: bool = False


@dataclass(frozen=True)
class Judged:
    """A goal held against results.

    Attributes:
        goal: the goal.
        value: what was measured; None where it was not.
    """

    goal: Goal
    value: float | None

    @property
    def verdict(self) -> Verdict:
        """Whether the goal is reached."""
        if self.value is None:
            return "not measured"
        reached = self.value <= self.goal.limit if self.goal.at_most else self.value >= self.goal.limit
        return "reached" if reached else "missed"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"goal": self.goal.text, "limit": self.goal.limit, "value": self.value, "verdict": self.verdict}


_LONG = "real/kernel/{}/LLaVA-NeXT-Video-7B/b{}"
_SECONDS = "sides/{}/seconds/median"

GOALS: tuple[Goal, ...] = (
    Goal(
        "column sums of attention at 12,544 tokens: at most 1.25x the time of flash attention (sdpa)",
        _LONG.format("column_sums", 1),
        f"{_SECONDS.format('triton')}:{_SECONDS.format('sdpa')}",
        1.25,
        at_most=True,
    ),
    # The whole matrix of 12,544 tokens needs 10 GB in bfloat16 and twice that before it is rounded; it fits.
    Goal(
        "column sums of attention at 12,544 tokens: at least 8x faster than reading the whole attention",
        _LONG.format("column_sums", 1),
        f"{_SECONDS.format('attention read')}:{_SECONDS.format('triton')}",
        8.0,
    ),
    Goal(
        "flash attention and then one row of it at 12,544 tokens: at most 1.05x the time of flash attention alone",
        _LONG.format("few_rows", 1),
        f"{_SECONDS.format('sdpa and few rows')}:{_SECONDS.format('sdpa')}",
        1.05,
        at_most=True,
    ),
    Goal(
        "max-min selection of 64 of 576 tokens at batch 32: at least 20x faster than the straightforward torch loop",
        "real/kernel/max_min_select/LLaVA-1.5-7B/b32",
        f"{_SECONDS.format('loop')}:{_SECONDS.format('triton')}",
        20.0,
    ),
    Goal(
        "max-min selection of 640 of 12,544 tokens: under 5 ms",
        _LONG.format("max_min_select", 1),
        _SECONDS.format("triton"),
        5e-3,
        at_most=True,
    ),
    Goal(
        "gather_decode on 12,544 entries at batch 8: at least 75 % of copy bandwidth",
        _LONG.format("gather_decode", 8),
        "sides/triton/share_of_copy",
        0.75,
    ),
    Goal(
        "quant_decode on 12,544 entries at batch 8: at least 75 % of copy bandwidth",
        _LONG.format("quant_decode", 8),
        "sides/triton/share_of_copy",
        0.75,
    ),
    Goal(
        "LLaVA-NeXT shape, 2,880 to 160 visual tokens, batch 8: first token at least 4x faster",
        "real/model/LLaVA-NeXT-7B/b8/divprune(keep=160)",
        "sides/divprune(keep=160)/faster_first_token/median",
        4.0,
    ),
    Goal(
        "OneVision shape, video of 64 frames to 10 % of its tokens: prefill at least 6x faster, vision left out",
        "real/model/LLaVA-OneVision-7B/b1/divprune(keep=1254)",
        "sides/divprune(keep=1254)/faster_without_vision/median",
        6.0,
    ),
    Goal(
        "LLaVA-1.5 shape, decoding at batch 1 with compile=True: at least 4x faster than transformers uncompiled",
        "real/model/LLaVA-1.5-7B/b1/full, compiled",
        "sides/full, compiled/faster_per_token/median",
        4.0,
    ),
    Goal(
        "LLaVA-1.5 shape, decoding at batch 1 with compile=True: at least 75 % of the bandwidth floor",
        "real/model/LLaVA-1.5-7B/b1/full, compiled",
        "sides/full, compiled/share_of_decode_floor",
        0.75,
    ),
)


def judged(results: Mapping[str, Any]) -> list[Judged]:
    """Hold every goal against results; those of a machine without a GPU show none of them.

    Args:
        results: the content of a results file.

    Example:
        >>> {found.verdict for found in judged({"machine": {"kind": "cpu"}, "cells": {}})}
        {'not measured'}
    """
    cells = results["cells"] if results["machine"]["kind"] == "cuda" else {}
    return [Judged(goal, _figure(cells.get(goal.cell), goal.path)) for goal in GOALS]


def _figure(cell: Any, path: str) -> float | None:
    values = [_found(cell, part) for part in path.split(":")]
    if any(value is None for value in values):
        return None
    return float(values[0] if len(values) == 1 else values[0] / values[1])


def _found(cell: Any, path: str) -> Any:
    for name in path.split("/"):
        if not isinstance(cell, Mapping) or name not in cell:
            return None
        cell = cell[name]
    return cell
