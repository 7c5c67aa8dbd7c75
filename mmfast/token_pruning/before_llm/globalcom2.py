"""GlobalCom2: the thumbnail says how much each crop may keep, and joins in saying what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mmfast.budget import shares
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Selector, VisionSignal, check_choice
from mmfast.token_pruning.before_llm.hired import regions_of, whole_and_crops
from mmfast.token_pruning.similarity import highest_first, merged_keep
from mmfast.tokens import Keep, Layout, VisualTokens

_TEMPERATURE = 10.0


@register("globalcom2", stage="before_llm", paper="arXiv 2501.05179", source="xuyang-liu16/GlobalCom2", vectors=True)
@dataclass(frozen=True)
class GlobalCom2(Selector):
    """Let the thumbnail of an image guide what is kept of its crops.

    Scores are the class token's logits in the last block. A crop may keep the more, the higher the thumbnail's
    scores add up over its region; inside it, its own scores and those of the thumbnail, enlarged to the grid of
    all crops, are added, each scaled to length one. Counts add up to ``keep``. Images that are not cut keep their
    best tokens.

    The official code cuts counts off tile by tile, so that they do not add up, hands on the thumbnail's tokens by
    falling score, and orders those of padded crops as if there were no padding (``compat="official"``).

    Paper: "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large
    Vision-Language Models", AAAI 2026.

    Attributes:
        compat: ``"official"`` takes over counts and order of the official code.
    """

    needs = frozenset({"cls_logits"})

    keep: int | float | None = 0.25
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the class token's logits in the last block."""
        return {"logits": VisionSignal("cls_logits", "last")}

    def reduce(self, tokens: VisualTokens, kept: int) -> Keep:
        """Choose tokens, and hand them on in raster order or the official one."""
        parts = whole_and_crops(tokens.layout)
        if parts is None or self.compat is None:
            return super().reduce(tokens, kept)
        thumbnail, *crops = self.ranked(tokens, parts, kept)
        lines = official_lines(crops, parts, tokens.layout)
        order = torch.cat([thumbnail, *lines])
        source = torch.full((len(tokens),), -1, dtype=torch.int64, device=order.device)
        source[order] = torch.arange(order.numel(), device=order.device)
        ones = torch.ones(order.numel(), device=order.device)
        return merged_keep(order, tokens.features[order], ones, source, raster=False)

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Choose in the thumbnail and in each crop."""
        parts = whole_and_crops(tokens.layout)
        if parts is None:
            return highest_first(tokens.signals["logits"], kept)
        return torch.cat(self.ranked(tokens, parts, kept))

    def ranked(self, tokens: VisualTokens, parts: tuple[Tensor, list[Tensor]], kept: int) -> list[Tensor]:
        """Share the budget and choose the best of the thumbnail and of each crop.

        Args:
            tokens: of an image with crops.
            parts: places of the thumbnail and of each crop.
            kept: the budget.

        Returns:
            int64 places, by falling score: of the thumbnail, then of each crop.
        """
        logits, layout = tokens.signals["logits"].float(), tokens.layout
        base, crops = parts
        device = logits.device
        thumbnail = logits[base.to(device)]
        sizes = [base.numel(), *(crop.numel() for crop in crops)]
        share = self.keep if isinstance(self.keep, float) else kept / len(tokens)
        scales = crop_scales(crop_sums(thumbnail, regions_of(layout, base).to(device), len(crops)), share)
        wanted = [size * scale for size, scale in zip(sizes, [share, *scales.tolist()], strict=True)]
        counts = [int(count) for count in wanted] if self.compat == "official" else fitted(wanted, sizes, kept)
        cut = torch.cat(crops)
        grid = int(layout.row[cut].max()) + 1, int(layout.col[cut].max()) + 1
        enlarged = enlarge(thumbnail, int(layout.col[base].max()) + 1, grid)
        chosen = [base.to(device)[highest_first(thumbnail, counts[0])]]
        for places, count in zip(crops, counts[1:], strict=True):
            seen = enlarged[layout.row[places].to(device), layout.col[places].to(device)]
            own = places.to(device)
            chosen.append(own[highest_first(joint_scores(logits[own], seen), count)])
        return chosen


def crop_sums(thumbnail: Tensor, regions: Tensor, crops: int) -> Tensor:
    """Add up the thumbnail's scores over the region of each crop.

    Args:
        thumbnail: ``[N]``.
        regions: ``[N]`` int64, number of the crop.
        crops: number of crops.

    Returns:
        float32 ``[crops]``.

    Example:
        >>> crop_sums(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 1]), 2).tolist()
        [1.0, 5.0]
    """
    member = (torch.arange(crops, device=regions.device)[:, None] == regions).float()
    return member @ thumbnail.float()


def crop_scales(sums: Tensor, keep: float) -> Tensor:
    """Say what share of its tokens each crop keeps.

    Args:
        sums: ``[crops]`` of the thumbnail's scores.
        keep: share of all tokens.

    Returns:
        float32 ``[crops]``, at most 1.

    Example:
        >>> crop_scales(torch.tensor([4.0, 4.0]), 0.25).tolist()
        [0.25, 0.25]
    """
    raised = ((sums - sums.max()) / _TEMPERATURE).exp()
    weights = raised / (raised.sum() + 1e-8)
    return (keep * (1.0 + weights - weights.mean())).clamp_max(1.0)


def enlarge(thumbnail: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """Resize the thumbnail's scores, bilinearly, to the grid of all crops.

    Args:
        thumbnail: ``[rows * side]`` in raster order.
        side: columns of the thumbnail.
        size: rows and columns of the grid of all crops.

    Returns:
        float32 ``[rows, columns]``.

    Example:
        >>> enlarge(torch.ones(4), 2, (3, 5)).shape
        torch.Size([3, 5])
    """
    grid = thumbnail.float().view(1, 1, -1, side)
    return interpolate(grid, size=size, mode="bilinear", align_corners=False)[0, 0]


def joint_scores(own: Tensor, seen: Tensor) -> Tensor:
    """Add a crop's own scores and those of the thumbnail, each scaled to length one; all ``[n]``.

    Example:
        >>> [round(value, 2) for value in joint_scores(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])).tolist()]
        [1.6, 0.8]
    """
    joint: Tensor = own / own.norm().clamp_min(1e-12) + seen / seen.norm().clamp_min(1e-12)
    return joint


def fitted(wanted: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Round wanted counts so that they add up to ``total`` and none exceeds its size.

    Example:
        >>> fitted([2.6, 2.6, 9.0], [5, 5, 6], 13)
        [4, 3, 6]
    """
    counts = [0] * len(sizes)
    left = total
    while left > 0:
        room = [size - count for size, count in zip(sizes, counts, strict=True)]
        weights = [max(1, int(want * 1e6)) if space else 0 for want, space in zip(wanted, room, strict=True)]
        for index, share in enumerate(shares(left, weights)):
            counts[index] += min(share, room[index])
        left = total - sum(counts)
    return counts


def official_lines(ranked: Sequence[Tensor], parts: tuple[Tensor, Sequence[Tensor]], layout: Layout) -> list[Tensor]:
    """Order the kept tokens of crops as the official code does, line by line over the grid of all crops.

    It takes the number of a token among those of its crop that are no padding for the place in the crop, so that
    the tokens of a padded crop move up.

    Args:
        ranked: kept tokens of each crop, int64 places.
        parts: places of the thumbnail and of each crop, ascending.
        layout: of the image.

    Returns:
        int64 places of each line, some perhaps empty; the official code puts a newline behind every one.

    Example:
        >>> from dataclasses import replace
        >>> layout = replace(Layout.grid(2, 2), crop_grid=(1, 1))
        >>> whole = torch.arange(4)
        >>> [line.tolist() for line in official_lines([torch.tensor([7, 5])], (whole, [whole + 4]), layout)]
        [[5], [7]]
    """
    base, crops = parts
    rows, columns = layout.crop_grid
    side = int(layout.col[base].max()) + 1
    found = []
    for number, (own, kept) in enumerate(zip(crops, ranked, strict=True)):
        place = torch.searchsorted(own.to(kept.device), kept)
        row = number // columns * side + place // side
        found.append(row * columns * side + number % columns * side + place % side)
    slot, order = torch.cat(found).sort()
    lengths = torch.bincount(slot // (columns * side), minlength=rows * side)
    return list(torch.cat(list(ranked))[order].split(lengths.tolist()))
