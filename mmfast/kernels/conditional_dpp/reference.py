"""Greedy choice by determinants in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.kernels.rows import normalised

FLOOR = 1e-10
"""Share of the largest gain of all below which a gain is rounding error."""


def conditional_dpp(features: Tensor, relevance: Tensor, kept: int, lengths: Sequence[int]) -> Tensor:
    """Pick ``kept`` rows of each image; arguments and result as of the operation, with counts as numbers."""
    picks = torch.full((len(lengths), kept), -1, dtype=torch.int64, device=features.device)
    for image, length in enumerate(lengths):
        wanted = min(kept, length)
        if wanted:
            unit, own = normalised(features[image, :length]), relevance[image, :length].float()
            picks[image, :wanted] = _likeliest(unit, own, wanted)
    return picks


def _likeliest(unit: Tensor, relevance: Tensor, kept: int) -> Tensor:
    total = unit.shape[0]
    # What each row would still add to the determinant, given what is chosen.
    gain = relevance.square() * unit.square().sum(dim=-1)
    floor = FLOOR * float(gain.max())
    rows = unit.new_zeros(kept, total)
    free = torch.ones(total, dtype=torch.bool, device=unit.device)
    picks = torch.empty(kept, dtype=torch.int64, device=unit.device)
    for step in range(kept):
        best = gain.masked_fill(~free, -torch.inf)
        pick = int(best.argmax())
        spent = float(best[pick]) <= floor or math.isnan(float(best[pick]))
        if spent:
            pick = int(relevance.masked_fill(~free, -torch.inf).argmax())
        picks[step] = pick
        free[pick] = False
        if spent:
            continue
        kernel = relevance[pick] * relevance * (unit @ unit[pick])
        row = (kernel - rows[:step, pick] @ rows[:step]) / gain[pick].sqrt()
        rows[step] = row
        gain = gain - row.square()
    return picks
