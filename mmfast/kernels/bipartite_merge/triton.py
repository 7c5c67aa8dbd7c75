"""Bipartite matching and averages by size in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.rows import normalised

_TILE = 32
"""Rows, partners and channels of one matrix product."""
_WIDEST = 1024
"""Most channels that one program averages."""


def partners(metric: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Find for each row at an even place the most similar at an odd place; as of the reference, with int32 counts.

    No matrix of similarities is stored.
    """
    unit = normalised(metric).contiguous()
    batch, total, width = unit.shape
    half = (total + 1) // 2
    closeness = torch.empty(batch, half, device=unit.device)
    partner = torch.empty(batch, half, dtype=torch.int64, device=unit.device)
    with torch.cuda.device_of(unit):
        _partners[(triton.cdiv(half, _TILE), batch)](unit, counts, closeness, partner, total, half, width, TILE=_TILE)
    return closeness, partner


def average_groups(features: Tensor, sizes: Tensor | None, source: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Average the rows of each group, one after the other; arguments and result as of the operation."""
    batch, total, width = features.shape
    group, order = source.long().sort(dim=1, stable=True)
    edges = torch.arange(groups + 1, device=source.device).expand(batch, -1).contiguous()
    starts = torch.searchsorted(group, edges)
    merged = torch.empty(batch, groups, width, dtype=features.dtype, device=features.device)
    summed = torch.empty(batch, groups, device=features.device)
    weights = torch.ones(batch, total, device=features.device) if sizes is None else sizes.float().contiguous()
    wide = min(_WIDEST, triton.next_power_of_2(width))
    with torch.cuda.device_of(features):
        _average[(groups, triton.cdiv(width, wide), batch)](
            features.contiguous(), weights, order, starts, merged, summed, total, groups, width,
            WIDE=wide,
        )  # fmt: skip
    return merged, summed


@triton.jit(do_not_specialize=["total", "half", "width"])
def _partners(
    unit,
    counts,
    closeness,
    partner,
    total,
    half,
    width,
    TILE: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + image)
    even = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = even * 2 < count
    ours = unit + (image * total + even * 2)[:, None] * width
    best = tl.full([TILE], -float("inf"), dtype=tl.float32)
    found = tl.zeros([TILE], dtype=tl.int32)
    for first in range(0, count // 2, TILE):
        odd = first + tl.arange(0, TILE)
        exists = odd * 2 + 1 < count
        theirs = unit + (image * total + odd * 2 + 1)[None, :] * width
        likeness = tl.zeros([TILE, TILE], dtype=tl.float32)
        for start in range(0, width, TILE):
            column = start + tl.arange(0, TILE)
            seen = column < width
            own = tl.load(ours + column[None, :], mask=inside[:, None] & seen[None, :], other=0.0)
            other = tl.load(theirs + column[:, None], mask=seen[:, None] & exists[None, :], other=0.0)
            likeness = tl.dot(own, other, likeness, input_precision="ieee")
        likeness = tl.where(exists[None, :], likeness, -float("inf"))
        top = tl.max(likeness, axis=1)
        place = tl.min(tl.where(likeness == top[:, None], odd[None, :], total), axis=1)
        # Only what is closer replaces, so the lowest of equal partners stays.
        closer = top > best
        best = tl.where(closer, top, best)
        found = tl.where(closer, place, found)
    tl.store(closeness + image * half + even, tl.where(inside, best, -float("inf")), mask=even < half)
    tl.store(partner + image * half + even, tl.where(inside, found, 0).to(tl.int64), mask=even < half)


@triton.jit(do_not_specialize=["total", "groups", "width"])
def _average(
    features,
    sizes,
    order,
    starts,
    merged,
    summed,
    total,
    groups,
    width,
    WIDE: tl.constexpr,
):
    group = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    seen = column < width
    edge = starts + image * (groups + 1) + group
    whole = tl.zeros([WIDE], dtype=tl.float32)
    size = tl.zeros([WIDE], dtype=tl.float32)
    for member in range(tl.load(edge), tl.load(edge + 1)):
        row = image * total + tl.load(order + image * total + member)
        weight = tl.load(sizes + row)
        whole += tl.load(features + row * width + column, mask=seen, other=0.0).to(tl.float32) * weight
        size += weight
    out = image * groups + group
    average = tl.math.div_rn(whole, tl.where(size > 0.0, size, 1.0))
    tl.store(merged + out * width + column, average.to(merged.dtype.element_ty), mask=seen)
    tl.store(summed + out + column, size, mask=column == 0)
