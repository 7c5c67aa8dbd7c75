"""FoPru: keep the most attended patches of the encoder, one by one or row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Selector, VisionSignal, check_choice
from mmfast.token_pruning.similarity import highest_first
from mmfast.tokens import VisualTokens


@register("fopru", stage="before_llm", paper="arXiv 2411.14164")
@dataclass(frozen=True)
class FoPru(Selector):
    """Keep what the encoder attends to most: single patches, or whole rows of them.

    No official code is public. The paper leaves open how the attention is reduced; here it is what a patch
    receives in the feature block, or what the class token gives to it (``score="cls"``). Row by row, the rows
    with the largest sums stay whole, and the last one is cut to its best patches so that the count is exact.

    Paper: "FoPru: Focal Pruning for Efficient Large Vision-Language Models".

    Attributes:
        strategy: ``"rank"`` patch by patch, ``"row"`` row by row.
        score: ``"received"`` or ``"cls"``.
    """

    needs = frozenset({"received_attention"})

    keep: int | float | None = 0.25
    scope: Literal["global", "per_tile"] = "per_tile"
    strategy: Literal["rank", "row"] = "rank"
    score: Literal["received", "cls"] = "received"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("strategy", self.strategy, ["rank", "row"])
        check_choice("score", self.score, ["received", "cls"])

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the attention of the feature block."""
        return {"significance": VisionSignal("received_attention" if self.score == "received" else "cls_attention")}

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Choose patches or rows."""
        significance = tokens.signals["significance"]
        if self.strategy == "rank" or not tokens.layout.grid_known:
            return highest_first(significance, kept)
        layout = tokens.layout
        where = torch.stack([layout.frame, layout.tile, layout.row], dim=-1)
        _, row = torch.unique(where, dim=0, return_inverse=True)
        return by_rows(significance, row.to(significance.device), kept)


def by_rows(significance: Tensor, row: Tensor, kept: int) -> Tensor:
    """Take whole rows by their sums, and the best patches of the last one that does not fit.

    Args:
        significance: ``[N]``.
        row: ``[N]`` int64, row of each patch, 0-based.
        kept: how many patches.

    Returns:
        ``[kept]`` int64, in the order in which they are taken.

    Example:
        >>> by_rows(torch.tensor([0.1, 0.2, 0.5, 0.4]), torch.tensor([0, 0, 1, 1]), 3).tolist()
        [2, 3, 1]
    """
    rows = int(row.max()) + 1
    sums = torch.zeros(rows, device=significance.device)
    for number in range(rows):
        sums[number] = significance[row == number].float().sum()
    taken: list[Tensor] = []
    left = kept
    for number in highest_first(sums, rows).tolist():
        places = (row == number).nonzero().squeeze(-1)
        if places.numel() > left:
            places = places[highest_first(significance[places], left)]
        taken.append(places)
        left -= places.numel()
        if left == 0:
            break
    return torch.cat(taken)
