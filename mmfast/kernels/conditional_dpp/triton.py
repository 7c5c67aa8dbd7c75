"""Greedy choice by determinants in Triton: every pick is one launch for the whole batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.conditional_dpp.reference import FLOOR
from mmfast.kernels.greedy import BLOCK, WIDE, Offers, best_offer, best_row, cosines, without_spent
from mmfast.kernels.rows import normalised


def conditional_dpp(features: Tensor, relevance: Tensor, kept: int, counts: Tensor) -> Tensor:
    """Pick ``kept`` rows of each image; arguments and result as of the operation, with counts as int32."""
    padding = torch.arange(features.shape[1], device=features.device) >= counts[:, None]
    unit = normalised(features).masked_fill(padding[..., None], 0.0).contiguous()
    relevance = relevance.float().masked_fill(padding, 0.0).contiguous()
    batch, total, width = unit.shape
    gain = relevance.square() * unit.square().sum(dim=-1)
    floor = FLOOR * gain
    taken = padding.to(torch.int8)
    factor = torch.empty(batch, kept, total, device=unit.device)
    picks = torch.empty(batch, kept, dtype=torch.int64, device=unit.device)
    with torch.cuda.device_of(unit):
        offers = Offers(unit, batch, total)
        for step in range(kept + 1):
            _step[(offers.blocks, batch)](
                unit, relevance, gain, floor, taken, factor, offers.score, offers.place, picks,
                total, width, offers.blocks, kept, step, BLOCK=BLOCK, WIDE=WIDE, PARTS=offers.parts,
            )  # fmt: skip
    return without_spent(picks, counts)


@triton.jit(do_not_specialize=["total", "width", "blocks", "kept", "step"])
def _step(
    unit, relevance, gain, floor, taken, factor, offers, places, picks,
    total, width, blocks, kept, step,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Find what the step before picked, -1 in step 0, take it out of all gains, and offer the best of this block."""
    part = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1)
    before = ((step + 1) % 2 * batch + image) * blocks
    after = (step % 2 * batch + image) * blocks
    best, pick = best_offer(offers, places, before, blocks, total, PARTS)
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
        # Nothing is taken out for a pick that gains nothing.
        if best > 0.0:
            likeness = cosines(unit, image * total, row, inside, pick, width, BLOCK, WIDE)
            known = tl.zeros([WIDE, BLOCK], dtype=tl.float32)
            for start in range(0, step - 1, WIDE):
                earlier = start + tl.arange(0, WIDE)
                exists = earlier < step - 1
                at = factor + (image * kept + earlier) * total
                ours = tl.load(at[:, None] + row[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
                known += tl.load(at + pick, mask=exists, other=0.0)[:, None] * ours
            own_weight = tl.load(relevance + image * total + pick)
            kernel = own_weight * weight * likeness - tl.sum(known, axis=0)
            added = tl.math.div_rn(kernel, tl.math.sqrt_rn(best))
        left -= added * added
        tl.store(factor + (image * kept + step - 1) * total + row, added, mask=inside)
        tl.store(gain + image * total + row, left, mask=inside)
        tl.store(taken + image * total + row, gone.to(tl.int8), mask=inside)
    # Where nothing is gained any more all are equal, and the lowest is picked.
    score = tl.where(left > tl.load(floor + image * total + row, mask=inside, other=0.0), left, 0.0)
    best, place = best_row(tl.where(gone == 0, score, -float("inf")), row, total)
    tl.store(offers + after + part, best)
    tl.store(places + after + part, place)
