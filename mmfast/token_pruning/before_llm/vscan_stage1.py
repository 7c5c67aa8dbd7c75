"""VScan, first stage: local details by a shallow block, the whole by a deep one, and merging of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Merger, VisionSignal, check_choice, top_indices
from mmfast.token_pruning.similarity import most_similar, sum_by_group
from mmfast.tokens import Keep, Layout, VisualTokens

_WINDOWS = 4
"""Windows per side: 4 x 4 of 6 x 6 patches in a grid of 24 x 24."""


@register(
    "vscan_stage1", stage="before_llm", paper="arXiv 2505.22654", source="Tencent/SelfEvolvingAgent", vectors=True
)
@dataclass(frozen=True)
class VScanStage1(Merger):
    """Keep half of the budget window by window, half over the whole image, and merge what is dropped.

    Each of 16 windows keeps its best tokens by the attention of the class token in a shallow block; the rest of
    the budget goes to the best of the deep block. Every dropped token is averaged into the kept one it resembles
    most. Where the budget does not divide by the windows, the official code keeps fewer tokens than asked for
    (``compat="official"``); here the next best of the deep block fill up.

    Paper: "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models", TMLR 2026.

    Attributes:
        shallow_layer: block of the local scores, index or relative depth (5 of 24).
        compat: ``"official"`` leaves the remainder of the division unused.
    """

    needs = frozenset({"cls_attention"})

    scope: Literal["global", "per_tile"] = "per_tile"
    shallow_layer: int | float = 5 / 24
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the attention of the class token in both blocks."""
        return {
            "shallow": VisionSignal("cls_attention", self.shallow_layer),
            "deep": VisionSignal("cls_attention"),
        }

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Choose, then merge."""
        windows = windows_of(tokens.layout)
        chosen = local_and_global(
            tokens.signals["shallow"],
            tokens.signals["deep"],
            windows.to(tokens.features.device),
            kept,
            fill=self.compat is None,
        )
        return merged_into(tokens.features, chosen)


def windows_of(layout: Layout) -> Tensor:
    """Number the window of each token, int64 ``[N]``; unknown layouts are cut into equal runs.

    Example:
        >>> windows_of(Layout.grid(4, 4))[:4].tolist()
        [0, 1, 2, 3]
    """
    if not layout.grid_known:
        total = len(layout)
        return torch.arange(total) * _WINDOWS**2 // max(total, 1)
    row, col = layout.row - layout.row.min(), layout.col - layout.col.min()
    height, width = int(row.max()) + 1, int(col.max()) + 1
    return (row * _WINDOWS // height) * _WINDOWS + col * _WINDOWS // width


def local_and_global(shallow: Tensor, deep: Tensor, windows: Tensor, kept: int, *, fill: bool = True) -> Tensor:
    """Choose the best of each window by one score, and the best of the rest by another.

    Args:
        shallow: ``[N]`` scores inside windows.
        deep: ``[N]`` scores over the whole.
        windows: ``[N]`` int64, 0..15.
        kept: how many tokens in all.
        fill: give what does not divide by the windows to the deep scores.

    Returns:
        Ascending int64 indices.

    Example:
        >>> eight = torch.arange(8)
        >>> local_and_global(eight.float(), -eight.float(), eight, 4).tolist()
        [0, 1, 2, 3]
    """
    each = kept // 2 // _WINDOWS**2
    local = torch.zeros_like(shallow, dtype=torch.bool)
    for window in range(_WINDOWS**2 if each else 0):
        mine = (windows == window).nonzero().squeeze(-1)
        local[mine[top_indices(shallow[mine], min(each, mine.numel()))]] = True
    whole = kept - int(local.sum()) if fill else kept - kept // 2
    best = top_indices(deep.float().masked_fill(local, -torch.inf if fill else 0.0), whole)
    local[best] = True
    return local.nonzero().squeeze(-1)


def merged_into(features: Tensor, chosen: Tensor) -> Keep:
    """Average every other token into the chosen one of highest cosine similarity.

    Args:
        features: ``[N, D]``.
        chosen: ``[K]`` int64, ascending.

    Example:
        >>> kept = merged_into(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 2]))
        >>> kept.features.tolist(), kept.source.tolist()
        ([[2.0, 0.0], [0.0, 1.0]], [0, 0, 1])
    """
    total, count = features.shape[0], chosen.numel()
    source = torch.full((total,), -1, dtype=torch.int64, device=features.device)
    source[chosen] = torch.arange(count, device=features.device)
    rest = (source < 0).nonzero().squeeze(-1)
    source[rest] = most_similar(features[rest], features[chosen])
    sizes = torch.bincount(source, minlength=count).float()
    merged = sum_by_group(features, source, count) / sizes[:, None]
    return Keep(chosen, merged.to(features.dtype), sizes, source)
