"""Greedy coverage in Triton: every pick is one launch for the whole batch, in which all rows are rated anew."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.greedy import BLOCK, WIDE, Offers, best_offer, best_row, without_spent
from mmfast.kernels.rows import normalised, row_blocks

_BATCH_ELEMENTS = 1 << 28
"""Entries of the similarities of several images held at once: 1 GiB."""


def greedy_cover(
    weights: Tensor,
    kept: int,
    counts: Tensor,
    saliency: Tensor | None,
    combine: str,
    excluded: Tensor | None,
) -> Tensor:
    """Pick ``kept`` rows of each image; arguments and result as of the operation, with counts as int32."""
    batch, total, things = weights.shape
    weights = weights.contiguous()
    taken = torch.arange(total, device=weights.device) >= counts[:, None]
    if excluded is not None:
        taken = taken | excluded
    free = total - taken.sum(dim=1)
    taken = taken.to(torch.int8)
    # Without saliency the weights stand in for it: the pointer is there, and nothing is read.
    rating = weights if saliency is None else saliency.detach().float().contiguous()
    covered = torch.zeros(2, batch, things, device=weights.device)
    picks = torch.empty(batch, kept, dtype=torch.int64, device=weights.device)
    with torch.cuda.device_of(weights):
        offers = Offers(weights, batch, total)
        for step in range(kept):
            _step[(offers.blocks, batch)](
                weights, rating, taken, covered, offers.score, offers.place, picks,
                total, things, offers.blocks, kept, step,
                WEIGHED=saliency is not None, ADD=combine == "add", BLOCK=BLOCK, WIDE=WIDE, PARTS=offers.parts,
            )  # fmt: skip
        picks[:, kept - 1] = offers.pick(kept - 1)
    return without_spent(picks, free)


def greedy_cover_cosine(features: Tensor, kept: int, counts: Tensor, saliency: Tensor | None, combine: str) -> Tensor:
    """Pick ``kept`` rows of each image; arguments and result as of the operation, with counts as int32."""
    batch, total, _ = features.shape
    padding = torch.arange(total, device=features.device) >= counts[:, None]
    unit = normalised(features).masked_fill(padding[..., None], 0.0)
    found = []
    for part in row_blocks(batch, total * total, _BATCH_ELEMENTS):
        similarity = unit[part] @ unit[part].transpose(1, 2)
        own = None if saliency is None else saliency[part]
        found.append(greedy_cover(similarity, kept, counts[part], own, combine, None))
    return torch.cat(found)


@triton.jit(do_not_specialize=["total", "things", "blocks", "kept", "step"])
def _step(
    weights, saliency, taken, covered, offers, places, picks,
    total, things, blocks, kept, step,
    WEIGHED: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Find what the step before picked, -1 in step 0, and offer the row of this block that adds most to it."""
    part = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1)
    before = (step + 1) % 2 * batch + image
    after = step % 2 * batch + image
    _, pick = best_offer(offers, places, before * blocks, blocks, total, PARTS)
    if (part == 0) & (step > 0):
        tl.store(picks + image * kept + step - 1, pick)
    row = part * BLOCK + tl.arange(0, BLOCK)
    inside = row < total
    gone = tl.load(taken + image * total + row, mask=inside, other=1)
    gone = tl.where(row == pick, 1, gone.to(tl.int32))
    tl.store(taken + image * total + row, gone.to(tl.int8), mask=inside)
    found = tl.where(pick < 0, 0, things)
    gain = tl.zeros([BLOCK, WIDE], dtype=tl.float32)
    for start in range(0, things, WIDE):
        column = start + tl.arange(0, WIDE)
        exists = column < things
        known = tl.load(covered + before * things + column, mask=exists, other=0.0)
        picked = weights + (image * total + pick) * things + column
        known = tl.maximum(known, tl.load(picked, mask=column < found, other=0.0).to(tl.float32))
        if part == 0:
            tl.store(covered + after * things + column, known, mask=exists)
        own = weights + (image * total + row)[:, None] * things + column[None, :]
        weight = tl.load(own, mask=(inside & (gone == 0))[:, None] & exists[None, :], other=0.0)
        gain += tl.maximum(weight.to(tl.float32) - known[None, :], 0.0)
    score = tl.sum(gain, axis=1)
    if WEIGHED:
        rating = tl.load(saliency + image * total + row, mask=inside, other=0.0)
        if ADD:
            score += rating
        else:
            score *= rating
    best, place = best_row(tl.where(gone == 0, score, -float("inf")), row, total)
    tl.store(offers + after * blocks + part, best)
    tl.store(places + after * blocks + part, place)
