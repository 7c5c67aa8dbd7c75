"""HiRED: a fixed budget, shared among the crops of an image by what a shallow block looks at."""

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


@register("hired", stage="before_llm", paper="arXiv 2408.10945", source="hasanar1f/HiRED", vectors=True)
@dataclass(frozen=True)
class HiRED(Selector):
    """Give the whole image and its crops shares of the budget, and keep the best of each by a deep block.

    The whole image gets the share ``alpha``. The rest goes to the crops by how much the class token of the first
    block attends to the region of the whole image that each crop shows; inside each, the deep block decides.
    What cutting off leaves goes to the next best tokens of the crops. Images that are not cut keep their best.

    The paper adds up attention per region (``score="sum"``); its code counts the most attended tokens, in equal
    strips of the flat sequence instead of regions, and leaves unused what cutting off leaves, so that fewer tokens
    than ``keep`` survive (``compat="official"``).

    Paper: "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language
    Models", AAAI 2025.

    Attributes:
        alpha: share of the budget for the whole image, in [0, 1]; 1 leaves the crops what does not fit there.
        score: how regions are rated: ``"count"`` of the most attended tokens, or ``"sum"`` of attention.
        compat: ``"official"`` takes strips for regions and hands nothing on.
    """

    needs = frozenset({"cls_attention"})

    keep: int | float | None = 0.2
    alpha: float = 0.5
    score: Literal["count", "sum"] = "count"
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("score", self.score, ["count", "sum"])
        check_choice("compat", self.compat, [None, "official"])
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1]: the whole image's share of the budget")

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the attention of the class token in the first and in the feature block."""
        return {"early": VisionSignal("cls_attention", 0, "sum"), "late": VisionSignal("cls_attention", heads="sum")}

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Share the budget, then choose tile by tile."""
        late, layout = tokens.signals["late"].float(), tokens.layout
        parts = whole_and_crops(layout)
        if parts is None:
            return highest_first(late, kept)
        base, crops = parts
        device = late.device
        regions = strips(base.numel(), len(crops)) if self.compat == "official" else regions_of(layout, base)
        whole = min(int(kept * self.alpha), base.numel())
        early = tokens.signals["early"].float()[base.to(device)]
        ratings = rated_regions(early, regions.to(device), len(crops), self.alpha, self.score)
        budgets = crop_budgets(ratings, min(kept - whole, late.numel() - base.numel()), [c.numel() for c in crops])
        chosen = [
            places[highest_first(late[places], budget)]
            for places, budget in zip([part.to(device) for part in (base, *crops)], [whole, *budgets], strict=True)
        ]
        picked = torch.cat(chosen)
        if self.compat == "official":
            return picked
        for part in (torch.cat(crops).to(device), base.to(device)):
            free = part[~torch.isin(part, picked)]
            picked = torch.cat([picked, free[highest_first(late[free], kept - picked.numel())]])
        return picked


def whole_and_crops(layout: Layout) -> tuple[Tensor, list[Tensor]] | None:
    """Tell the tokens of the whole image from those of its crops.

    Returns:
        Places of the whole image, int64 ``[N]``, and of each crop, row-major, some perhaps empty; None for an image
        that is not cut, and where one of the two is missing.

    Example:
        >>> whole_and_crops(Layout.grid(2, 2)) is None
        True
    """
    rows, columns = layout.crop_grid
    if layout.crop is None or rows * columns == 0:
        return None
    base = ((layout.tile == 0) & (layout.crop < 0)).nonzero().squeeze(-1)
    crops = [(layout.crop == crop).nonzero().squeeze(-1) for crop in range(rows * columns)]
    return (base, crops) if base.numel() and any(crop.numel() for crop in crops) else None


def regions_of(layout: Layout, base: Tensor) -> Tensor:
    """Say which crop shows the region of each token of the whole image.

    Args:
        layout: of an image with crops.
        base: ``[N]`` int64, places of the tokens of the whole image.

    Returns:
        int64 ``[N]``, number of the crop.

    Example:
        >>> from dataclasses import replace
        >>> regions_of(replace(Layout.grid(2, 4), crop_grid=(1, 2)), torch.arange(8)).tolist()
        [0, 0, 1, 1, 0, 0, 1, 1]
    """
    rows, columns = layout.crop_grid
    row, col = layout.row[base], layout.col[base]
    high, wide = int(row.max()) + 1, int(col.max()) + 1
    return region_grid(row, col, (high, wide), (rows, columns))


def region_grid(row: Tensor, col: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Cut a grid of tokens into equal regions; what does not divide goes to the last ones.

    Args:
        row: ``[N]`` int64.
        col: ``[N]`` int64.
        size: rows and columns of tokens.
        grid: rows and columns of regions.

    Example:
        >>> region_grid(torch.tensor([0, 4]), torch.tensor([4, 0]), (5, 5), (2, 2)).tolist()
        [1, 2]
    """
    high, wide = max(1, size[0] // grid[0]), max(1, size[1] // grid[1])
    return (row // high).clamp_max(grid[0] - 1) * grid[1] + (col // wide).clamp_max(grid[1] - 1)


def strips(total: int, crops: int) -> Tensor:
    """Cut the flat sequence into equal runs, one per crop, whatever region they show.

    Example:
        >>> strips(5, 2).tolist()
        [0, 0, 1, 1, 1]
    """
    return (torch.arange(total) // max(1, total // crops)).clamp_max(crops - 1)


def rated_regions(early: Tensor, regions: Tensor, crops: int, alpha: float, score: str) -> Tensor:
    """Rate each crop by its region's most attended tokens, or by the sum of attention.

    Args:
        early: ``[N]`` attention to the tokens of the whole image.
        regions: ``[N]`` int64.
        crops: number of crops.
        alpha: the share ``1 - alpha`` of the tokens counts as most attended.
        score: ``"count"`` or ``"sum"``.

    Returns:
        float32 ``[crops]``.

    Example:
        >>> rated_regions(torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0, 1, 1, 1]), 2, 0.5, "count").tolist()
        [1.0, 1.0]
    """
    member = (torch.arange(crops, device=regions.device)[:, None] == regions).float()
    if score == "sum":
        return member @ early
    marked = torch.zeros_like(early)
    marked[highest_first(early, int(early.numel() * (1.0 - alpha)))] = 1.0
    return member @ marked


def crop_budgets(ratings: Tensor, budget: int, sizes: list[int]) -> list[int]:
    """Share a budget in proportion to ratings; fractions are cut off, and no crop gets more than it has.

    Example:
        >>> crop_budgets(torch.tensor([1.0, 2.0]), 10, [100, 5])
        [3, 5]
    """
    total = float(ratings.sum())
    if total <= 0.0:
        return [0] * len(sizes)
    shares = (ratings / total * budget).int().tolist()
    return [min(share, size) for share, size in zip(shares, sizes, strict=True)]
