"""GlobalCom2: the thumbnail says how much each crop may keep, and joins in saying what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mmfast.budget import shares
from mmfast.registry import register
from mmfast.token_pruning.base import Selector, VisionSignal
from mmfast.token_pruning.before_llm.hired import regions_of
from mmfast.token_pruning.similarity import highest_first
from mmfast.tokens import VisualTokens

_TEMPERATURE = 10.0


@register("globalcom2", stage="before_llm", paper="arXiv 2501.05179", source="xuyang-liu16/GlobalCom2", vectors=True)
@dataclass(frozen=True)
class GlobalCom2(Selector):
    """Let the thumbnail of an image guide what is kept of its crops.

    Scores are the class token's logits in the last block. A crop may keep the more, the higher the thumbnail's
    scores add up over its region; inside it, its own scores and those of the thumbnail, enlarged to the grid of
    all crops, are added, each scaled to length one. Counts add up to ``keep``. Images that are not cut keep their
    best tokens.

    The official code puts what it keeps of padded crops into wrong places and a newline behind rows of padding
    too; here every token keeps its own place.

    Paper: "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large
    Vision-Language Models", AAAI 2026.
    """

    needs = frozenset({"cls_logits"})

    keep: int | float | None = 0.25

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the class token's logits in the last block."""
        return {"logits": VisionSignal("cls_logits", "last")}

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Share the budget, then choose in the thumbnail and in each crop."""
        logits, layout = tokens.signals["logits"].float(), tokens.layout
        rows, columns = layout.crop_grid
        if layout.crop is None or rows * columns == 0 or not bool((layout.crop >= 0).any()):
            return highest_first(logits, kept)
        base = ((layout.tile == 0) & (layout.crop < 0)).nonzero().squeeze(-1)
        crops = [(layout.crop == crop).nonzero().squeeze(-1) for crop in range(rows * columns)]
        device = logits.device
        thumbnail = logits[base.to(device)]
        sums = crop_sums(thumbnail, regions_of(layout, base).to(device), len(crops))
        scales = crop_scales(sums, kept / len(tokens))
        counts = fitted(
            [base.numel() * kept / len(tokens), *(c.numel() * s for c, s in zip(crops, scales.tolist(), strict=True))],
            [base.numel(), *(c.numel() for c in crops)],
            kept,
        )
        side = int(layout.col[base].max()) + 1
        cut = torch.cat(crops)
        size = int(layout.row[cut].max()) + 1, int(layout.col[cut].max()) + 1
        enlarged = enlarge(thumbnail, side, size)
        chosen = [base.to(device)[highest_first(thumbnail, counts[0])]]
        for places, count in zip(crops, counts[1:], strict=True):
            if count:
                seen = enlarged[layout.row[places].to(device), layout.col[places].to(device)]
                own = places.to(device)
                chosen.append(own[highest_first(joint_scores(logits[own], seen), count)])
        return torch.cat(chosen)


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
