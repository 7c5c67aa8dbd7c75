"""Density peaks in Triton: distances, densities, the way to what is denser, and the nearest centre."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 32
_CHANNELS = 8
"""Channels whose differences one program holds for a tile of pairs."""
_STATE = 8192
"""Distances that one program holds."""


def dpc_knn(features: Tensor, clusters: int, neighbours: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster the rows of each image; arguments and result as of the operation, with counts as numbers."""
    features = features.contiguous()
    batch, total, width = features.shape
    device = features.device
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    distance = torch.empty(batch, total, total, device=device)
    density, apart, farthest = (torch.empty(batch, total, device=device) for _ in range(3))
    padded = triton.next_power_of_2(total)
    rows = max(1, min(16, _STATE // padded))
    warps = 4 if padded <= _STATE else 16
    tiles, grid = triton.cdiv(total, _TILE), (triton.cdiv(total, rows), batch)
    place = torch.arange(total, device=device).expand(batch, -1)
    padding = place >= counts[:, None]
    with torch.cuda.device_of(features):
        _distances[(tiles, tiles, batch)](
            features, counts, distance, total, width, width**0.5, TILE=_TILE, CHANNELS=_CHANNELS
        )
        _density[grid](distance, counts, density, total, neighbours, ROWS=rows, BLOCK=padded, num_warps=warps)
        rank = torch.empty_like(place, memory_format=torch.contiguous_format)
        rank.scatter_(1, _highest_first(density), place)
        _apart[grid](distance, counts, rank, apart, farthest, total, ROWS=rows, BLOCK=padded, num_warps=warps)
        apart = torch.where(apart.isinf(), farthest.amax(dim=1, keepdim=True), apart)
        # The logarithm is taken in torch, where both forms take the same one.
        score = (density + apart.log()).masked_fill(padding, -torch.inf)
        centres = torch.full((batch, clusters), -1, dtype=torch.int64, device=device)
        found = _highest_first(score)[:, :clusters]
        centres[:, : found.shape[1]] = torch.where(place[:, : found.shape[1]] < counts[:, None], found, -1)
        owner = torch.empty(batch, total, dtype=torch.int64, device=device)
        _nearest[(tiles, batch)](distance, counts, centres, owner, total, clusters, BLOCK=_TILE)
    return centres, owner, score


def _highest_first(values: Tensor) -> Tensor:
    # Padding is -inf and comes after every row, so it comes last among equals too.
    return values.sort(dim=1, descending=True, stable=True).indices


@triton.jit(do_not_specialize=["total", "width", "root"])
def _distances(
    features,
    counts,
    distance,
    total,
    width,
    root,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums of squared differences, not products: what hidden states share would swallow small distances."""
    image = tl.program_id(2).to(tl.int64)
    count = tl.load(counts + image)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    ours = features + (image * total + row)[:, None] * width
    theirs = features + (image * total + column)[:, None] * width
    whole = tl.zeros([TILE, TILE], dtype=tl.float32)
    for start in range(0, width, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        seen = (channel < width)[None, :]
        own = tl.load(ours + channel[None, :], mask=(row < count)[:, None] & seen, other=0.0).to(tl.float32)
        other = tl.load(theirs + channel[None, :], mask=(column < count)[:, None] & seen, other=0.0).to(tl.float32)
        apart = own[:, None, :] - other[None, :, :]
        whole += tl.sum(apart * apart, axis=2)
    found = tl.math.div_rn(tl.math.sqrt_rn(whole), tl.full([TILE, TILE], root, dtype=tl.float32))
    inside = (row < count)[:, None] & (column < count)[None, :]
    at = distance + (image * total + row)[:, None] * total + column[None, :]
    tl.store(at, found, mask=inside)


@triton.jit(do_not_specialize=["total", "neighbours"])
def _density(distance, counts, density, total, neighbours, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + image)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (column < count)[None, :]
    at = distance + (image * total + row)[:, None] * total + column[None, :]
    left = tl.load(at, mask=inside, other=float("inf"))
    wanted = tl.minimum(neighbours, count)
    whole = tl.zeros([ROWS], dtype=tl.float32)
    for _ in range(wanted):
        least = tl.min(left, axis=1)
        whole += least * least
        first = tl.min(tl.where(left == least[:, None], column[None, :], BLOCK), axis=1)
        left = tl.where(column[None, :] == first[:, None], float("inf"), left)
    found = -tl.math.div_rn(whole, tl.full([ROWS], 0.0, dtype=tl.float32) + tl.maximum(wanted, 1))
    tl.store(density + image * total + row, tl.where(row < count, found, -float("inf")), mask=row < total)


@triton.jit(do_not_specialize=["total"])
def _apart(
    distance,
    counts,
    rank,
    apart,
    farthest,
    total,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + image)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (column < count)[None, :]
    at = distance + (image * total + row)[:, None] * total + column[None, :]
    found = tl.load(at, mask=inside, other=0.0)
    own = tl.load(rank + image * total + row, mask=row < count, other=0)
    theirs = tl.load(rank + image * total + column, mask=column < count, other=0)
    denser = inside & (theirs[None, :] < own[:, None])
    tl.store(apart + image * total + row, tl.min(tl.where(denser, found, float("inf")), axis=1), mask=row < total)
    tl.store(farthest + image * total + row, tl.max(found, axis=1), mask=row < total)


@triton.jit(do_not_specialize=["total", "clusters"])
def _nearest(distance, counts, centres, owner, total, clusters, BLOCK: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + image)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    least = tl.full([BLOCK], float("inf"), dtype=tl.float32)
    found = tl.zeros([BLOCK], dtype=tl.int32)
    own = tl.full([BLOCK], -1, dtype=tl.int32)
    for cluster in range(tl.minimum(clusters, count)):
        centre = tl.load(centres + image * clusters + cluster)
        away = tl.load(distance + (image * total + centre) * total + row, mask=inside, other=0.0)
        # Only what is nearer replaces, so the best of equally near centres stays.
        found = tl.where(away < least, cluster, found)
        least = tl.minimum(least, away)
        own = tl.where(row == centre, cluster, own)
    found = tl.where(own >= 0, own, found)
    tl.store(owner + image * total + row, tl.where(inside, found, -1).to(tl.int64), mask=row < total)
