"""Greedy choice by determinants in Triton: every pick is one launch for the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.conditional_dpp.reference import FLOOR
from mmfast.kernels.greedy import BLOCK, WIDE, Offers, best_offer, best_row, without_spent
from mmfast.kernels.rows import normalised


def conditional_dpp(features: Tensor, relevance: Tensor, kept: int, lengths: Sequence[int]) -> Tensor:
    """Pick ``kept`` rows of each image; arguments and result as of the operation, with counts as numbers."""
    counts = torch.tensor(lengths, dtype=torch.int32, device=features.device)
    padding = torch.arange(features.shape[1], device=features.device) >= counts[:, None]
    unit = normalised(features).masked_fill(padding[..., None], 0.0).contiguous()
    relevance = relevance.float().masked_fill(padding, 0.0).contiguous()
    batch, total, width = unit.shape
    gain = relevance.square() * unit.square().sum(dim=-1)
    floor = FLOOR * gain.amax(dim=1).double()
    taken = padding.to(torch.int8)
    factor = torch.empty(batch, kept, total, device=unit.device)
    picks = torch.empty(batch, kept, dtype=torch.int64, device=unit.device)
    with torch.cuda.device_of(unit):
        # What is likeliest, and what would follow by relevance alone.
        likely, relevant = Offers(unit, batch, total), Offers(unit, batch, total)
        for step in range(kept + 1):
            _step[(likely.blocks, batch)](
                unit, relevance, gain, floor, taken, factor,
                likely.score, likely.place, relevant.score, relevant.place, picks,
                total, width, likely.blocks, kept, step,
                BLOCK=BLOCK, WIDE=WIDE, PARTS=likely.parts,
            )  # fmt: skip
    return without_spent(picks, counts)


@triton.jit(do_not_specialize=["total", "width", "blocks", "kept", "step"])
def _step(
    unit,
    relevance,
    gain,
    floor,
    taken,
    factor,
    likely,
    likely_places,
    relevant,
    relevant_places,
    picks,
    total,
    width,
    blocks,
    kept,
    step,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Find what the step before picked, -1 in step 0, take it out of all gains, and offer the best of this block."""
    part = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1)
    before = ((step + 1) % 2 * batch + image) * blocks
    after = (step % 2 * batch + image) * blocks
    best, pick = best_offer(likely, likely_places, before, blocks, total, PARTS)
    _, fallback = best_offer(relevant, relevant_places, before, blocks, total, PARTS)
    # Infinity stands for what is not a number.
    spent = (best.to(tl.float64) <= tl.load(floor + image)) | (best == float("inf"))
    pick = tl.where(spent, fallback, pick)
    if (part == 0) & (step > 0):
        tl.store(picks + image * kept + step - 1, pick)
    row = part * BLOCK + tl.arange(0, BLOCK)
    inside = row < total
    weight = tl.load(relevance + image * total + row, mask=inside, other=0.0)
    left = tl.load(gain + image * total + row, mask=inside, other=0.0)
    gone = tl.load(taken + image * total + row, mask=inside, other=1).to(tl.int32)
    gone = tl.where(row == pick, 1, gone)
    if step > 0:
        added = tl.zeros([BLOCK], dtype=tl.float32)
        if not spent:
            likeness = tl.zeros([BLOCK, WIDE], dtype=tl.float32)
            for start in range(0, width, WIDE):
                column = start + tl.arange(0, WIDE)
                picked = tl.load(unit + (image * total + pick) * width + column, mask=column < width, other=0.0)
                own = unit + (image * total + row)[:, None] * width + column[None, :]
                seen = inside[:, None] & (column < width)[None, :]
                likeness += tl.load(own, mask=seen, other=0.0) * picked[None, :]
            known = tl.zeros([WIDE, BLOCK], dtype=tl.float32)
            for start in range(0, step - 1, WIDE):
                earlier = start + tl.arange(0, WIDE)
                exists = earlier < step - 1
                at = factor + (image * kept + earlier) * total
                ours = tl.load(at[:, None] + row[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
                known += tl.load(at + pick, mask=exists, other=0.0)[:, None] * ours
            own_weight = tl.load(relevance + image * total + pick)
            kernel = own_weight * weight * tl.sum(likeness, axis=1) - tl.sum(known, axis=0)
            added = tl.math.div_rn(kernel, tl.math.sqrt_rn(best))
        left -= added * added
        tl.store(factor + (image * kept + step - 1) * total + row, added, mask=inside)
        tl.store(gain + image * total + row, left, mask=inside)
        tl.store(taken + image * total + row, gone.to(tl.int8), mask=inside)
    # What is not a number comes first, as it does in torch, and the pick of its relevance follows.
    score = tl.where(left == left, left, float("inf"))
    best, place = best_row(tl.where(gone == 0, score, -float("inf")), row, total)
    tl.store(likely + after + part, best)
    tl.store(likely_places + after + part, place)
    best, place = best_row(tl.where(gone == 0, weight, -float("inf")), row, total)
    tl.store(relevant + after + part, best)
    tl.store(relevant_places + after + part, place)
