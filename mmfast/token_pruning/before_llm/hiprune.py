"""HiPrune: anchors from a middle block with their neighbours, the rest from a deep one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Selector, VisionSignal, check_choice
from mmfast.token_pruning.similarity import highest_first
from mmfast.tokens import Layout, VisualTokens


@register("hiprune", stage="before_llm", paper="arXiv 2508.00553", source="Danielement321/HiPrune", vectors=True)
@dataclass(frozen=True)
class HiPrune(Selector):
    """Keep anchors of a middle block with the patches around them, and fill up by a deep block.

    A block in the middle of the encoder attends to objects: its most attended patches are anchors, and their
    four neighbours stay with them. What is left of the budget goes to the patches that the feature block attends
    to most. The official code finds neighbours by the flat index, so that they wrap from row to row
    (``compat="official"``); here they follow the grid.

    Paper: "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
    AAAI 2026.

    Attributes:
        alpha: share of the budget for anchors and their neighbours, in [0, 1].
        object_layer: the middle block, index or relative depth (the ninth of 24).
        compat: ``"official"`` lets neighbours wrap.
    """

    needs = frozenset({"received_attention"})

    scope: Literal["global", "per_tile"] = "per_tile"
    alpha: float = 0.1
    object_layer: int | float = 8 / 24
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1]: the share of keep for anchors and neighbours")

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the attention that patches receive in both blocks."""
        return {
            "object": VisionSignal("received_attention", self.object_layer),
            "deep": VisionSignal("received_attention"),
        }

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Choose anchors, their neighbours, and the best of the rest."""
        middle, deep = tokens.signals["object"], tokens.signals["deep"]
        # An anchor brings four neighbours: five tokens each.
        anchors = highest_first(middle, min(round(kept * self.alpha / 5), kept))
        official = self.compat == "official"
        around = wrapped_neighbours(anchors, tokens.layout) if official else neighbours(anchors, tokens.layout)
        # Overlaps and edges are counted once; anchors come first where all do not fit.
        chosen = torch.cat([anchors, around[~torch.isin(around, anchors)]])[:kept]
        rest = deep.float().clone()
        rest[chosen] = -torch.inf
        return torch.cat([chosen, highest_first(rest, kept - chosen.numel())])


def neighbours(places: Tensor, layout: Layout) -> Tensor:
    """Return the tokens left, right, above and below some tokens, each once.

    Example:
        >>> neighbours(torch.tensor([0, 3]), Layout.grid(2, 2)).tolist()
        [1, 2]
    """
    if not layout.grid_known:
        around = torch.cat([places - 1, places + 1])
        inside: Tensor = around[(around >= 0) & (around < len(layout))].unique()
        return inside
    # Every token gets one number, with a margin around each grid, so that a step never ends in another row.
    high, wide = int(layout.row.max()) + 2, int(layout.col.max()) + 2
    tile = layout.frame * (int(layout.tile.max()) + 1) + layout.tile
    number = (tile * high + layout.row) * wide + layout.col
    around = number[places.cpu()] + torch.tensor([[-wide], [-1], [1], [wide]])
    return torch.isin(number, around).nonzero().squeeze(-1).to(places.device)


def wrapped_neighbours(places: Tensor, layout: Layout) -> Tensor:
    """Return neighbours by the flat index, clamped to the ends, each once; they wrap from row to row.

    Example:
        >>> wrapped_neighbours(torch.tensor([1]), Layout.grid(2, 2)).tolist()
        [0, 2, 3]
    """
    width = int(layout.col.max()) + 1 if layout.grid_known else 1
    around = torch.cat([places - 1, places + 1, places - width, places + width])
    clamped: Tensor = around.clamp(0, len(layout) - 1).unique()
    return clamped
