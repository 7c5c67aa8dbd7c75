"""SparseVLM+: the raters' attention, freed from the trend of rotary positions, over the heads that care."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.in_llm.sparsevlm import SparseVLM
from mmfast.token_pruning.layers import LayerTokens

PRESETS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
"""Published schedules for 576 visual tokens: tokens kept after layers 2, 6 and 15 of 32."""


@register("sparsevlm_plus", stage="in_llm", paper="arXiv 2410.04417", source="Gumpest/SparseVLMs", vectors=True)
@dataclass(frozen=True)
class SparseVLMPlus(SparseVLM):
    """As SparseVLM, with attention divided by its rotary trend, over the heads that look most, and no merging.

    Every entry of the raters' attention is divided by what two vectors of ones would give at the same distance.
    That trend changes its sign and passes near zero, so scores may be huge or negative: as in version 2 of the
    official code, which takes the 14 of 28 heads with the largest sums.

    Attributes:
        rope_base: base of the rotary frequencies.
        rating_heads: heads that rate; 0 means half of them.
    """

    merges = False

    schedule: tuple[int, ...] = PRESETS[192]
    recycle: bool = False
    rope_base: float = 10000.0
    rating_heads: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_base <= 1.0:
            raise ValueError(f"rope_base={self.rope_base} must be above 1, as in the model's configuration")
        if self.rating_heads < 0:
            raise ValueError(f"rating_heads={self.rating_heads} must be a number of heads, or 0 for half of them")
        if self.recycle:
            raise ValueError("recycle=True belongs to 'sparsevlm'; this version merges nothing")

    def rate(self, tokens: LayerTokens) -> Tensor:
        """Average the corrected attention over raters and the heads that rate."""
        view, rows, columns = tokens.view(), self.raters(tokens), tokens.candidates
        places = torch.arange(view.length, device=columns.device) if tokens.places is None else tokens.places
        total = torch.zeros(view.heads, columns.numel(), device=columns.device)
        for part, block in view.blocks(rows):
            distance = places[rows[part]][:, None] - places[columns]
            total += (block[:, :, columns] / rotary_trend(distance, view.query.shape[-1], self.rope_base)).sum(dim=1)
        wanted = min(self.rating_heads or max(1, view.heads // 2), view.heads)
        heads = total.sum(dim=1).sort(descending=True, stable=True).indices[:wanted]
        return total[heads].mean(dim=0) / rows.numel()


def rotary_trend(distance: Tensor, width: int, base: float) -> Tensor:
    """Return the scaled product of two rotated vectors of ones at some distance.

    Args:
        distance: any shape, int64.
        width: size of a head.
        base: base of the rotary frequencies.

    Returns:
        float32, same shape: ``2 / sqrt(d) * sum_f cos(distance * theta_f)``, at least 1e-6 away from zero.

    Example:
        >>> rotary_trend(torch.tensor([0]), 16, 10000.0).tolist()
        [4.0]
    """
    frequencies = base ** (-torch.arange(0, width, 2, device=distance.device).float() / width)
    trend = torch.cos(distance[..., None].float() * frequencies).sum(dim=-1) * 2.0 / width**0.5
    # No attention divided by no trend would be no number.
    return torch.where(trend.abs() < 1e-6, trend.new_tensor(1e-6).copysign(trend), trend)
