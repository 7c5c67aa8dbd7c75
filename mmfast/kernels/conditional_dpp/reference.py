"""Greedy choice by determinants in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.kernels.rows import normalised

FLOOR = 1e-5
"""Share of its entry on the diagonal below which the gain of a row is rounding error, and counts as none."""


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
    floor = FLOOR * gain
    rows = unit.new_zeros(kept, total)
    free = torch.ones(total, dtype=torch.bool, device=unit.device)
    picks = torch.empty(kept, dtype=torch.int64, device=unit.device)
    for step in range(kept):
        # Where nothing is gained any more all are equal, and the lowest is picked.
        score = torch.where(gain > floor, gain, 0.0).masked_fill(~free, -torch.inf)
        pick = score.argmax()
        picks[step] = pick
        free[pick] = False
        kernel = relevance[pick] * relevance * (unit @ unit[pick])
        row = (kernel - rows[:step, pick] @ rows[:step]) / gain[pick].sqrt()
        # Without a condition, which would have to be waited for on a GPU.
        rows[step] = torch.where(score[pick] > 0.0, row, 0.0)
        gain = gain - rows[step].square()
    return picks
