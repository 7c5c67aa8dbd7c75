"""Max-min selection in Triton.

While an image's similarities fit into one matrix, one program walks through its picks: one launch for the whole
batch. Beyond, the similarities to a pick are computed anew, which is too much for one program; every pick is one
launch that all programs share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.greedy import BLOCK, WIDE, Offers, best_offer, best_row, cosines, without_spent
from mmfast.kernels.rows import normalised, row_blocks

_WALKED = 16384
"""Most rows whose state one program holds in registers."""
_BATCH_ELEMENTS = 1 << 28
"""Entries of the similarities of several images held at once: 1 GiB."""


def max_min_select(features: Tensor, kept: int, counts: Tensor, matrix_limit: int) -> Tensor:
    """Pick ``kept`` rows of each image; arguments and result as of the operation, with counts as int32."""
    unit = normalised(features).contiguous()
    batch, total, _ = unit.shape
    picks = torch.empty(batch, kept, dtype=torch.int64, device=unit.device)
    with torch.cuda.device_of(unit):
        if total <= min(matrix_limit, _WALKED):
            for part in row_blocks(batch, total * total, _BATCH_ELEMENTS):
                _with_matrix(unit[part], counts[part], picks[part])
        else:
            _without_matrix(unit, counts, picks)
    return without_spent(picks, counts)


def _with_matrix(unit: Tensor, counts: Tensor, picks: Tensor) -> None:
    batch, total, _ = unit.shape
    similarity = unit @ unit.transpose(1, 2)
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    padding = torch.arange(total, device=unit.device) >= counts[:, None]
    similarity.masked_fill_(padding[:, :, None], -torch.inf)
    nearest = similarity.amax(dim=1)
    block = triton.next_power_of_2(total)
    warps = 4 if block <= 1024 else 8 if block <= 4096 else 16
    _walk[(batch,)](similarity, nearest, counts, picks, total, picks.shape[1], BLOCK=block, num_warps=warps)


@triton.jit(do_not_specialize=["total", "kept"])
def _walk(similarity, nearest, counts, picks, total, kept, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK)
    count = tl.load(counts + image)
    inside = row < count
    score = -tl.load(nearest + image * total + row, mask=inside, other=float("inf"))
    largest = tl.where(inside, -float("inf"), float("inf"))
    for step in range(tl.minimum(kept, count)):
        _, pick = best_row(score, row, total)
        tl.store(picks + image * kept + step, pick)
        start = (image * total + pick) * total
        likeness = tl.load(similarity + start + row, mask=inside, other=float("inf"))
        largest = tl.where(row == pick, float("inf"), tl.maximum(largest, likeness))
        score = -largest


def _without_matrix(unit: Tensor, counts: Tensor, picks: Tensor) -> None:
    batch, total, width = unit.shape
    kept = picks.shape[1]
    padding = torch.arange(total, device=unit.device) >= counts[:, None]
    nearest = torch.empty(batch, total, device=unit.device)
    for part in row_blocks(total, batch * total):
        likeness = unit[:, part] @ unit.transpose(1, 2)
        likeness.diagonal(part.start, dim1=1, dim2=2).fill_(-torch.inf)
        nearest[:, part] = likeness.masked_fill_(padding[:, None], -torch.inf).amax(dim=2)
    offers = Offers(unit, batch, total)
    offers.seed(nearest.masked_fill_(padding, torch.inf).argmin(dim=1))
    largest = torch.full((batch, total), -torch.inf, device=unit.device)
    for step in range(1, kept):
        _step[(offers.blocks, batch)](
            unit, largest, counts, offers.score, offers.place, picks, total, width, offers.blocks, kept, step,
            BLOCK=BLOCK, WIDE=WIDE, PARTS=offers.parts,
        )  # fmt: skip
    picks[:, kept - 1] = offers.pick(kept - 1)


@triton.jit(do_not_specialize=["total", "width", "blocks", "kept", "step"])
def _step(
    unit, largest, counts, offers, places, picks,
    total, width, blocks, kept, step,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Find what the step before picked, and offer the row of this block that is farthest from all picks."""
    part = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1)
    _, pick = best_offer(offers, places, ((step + 1) % 2 * batch + image) * blocks, blocks, total, PARTS)
    if part == 0:
        tl.store(picks + image * kept + step - 1, pick)
    row = part * BLOCK + tl.arange(0, BLOCK)
    inside = row < tl.load(counts + image)
    likeness = cosines(unit, image * total, row, inside, pick, width, BLOCK, WIDE)
    nearest = tl.load(largest + image * total + row, mask=inside, other=float("inf"))
    nearest = tl.where(row == pick, float("inf"), tl.maximum(nearest, likeness))
    tl.store(largest + image * total + row, nearest, mask=inside)
    # Rows beyond the image are infinitely close: they never win, and the lowest of them is a row that exists.
    best, place = best_row(-tl.where(inside, nearest, float("inf")), row, total)
    tl.store(offers + (step % 2 * batch + image) * blocks + part, best)
    tl.store(places + (step % 2 * batch + image) * blocks + part, place)
