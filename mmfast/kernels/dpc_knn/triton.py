"""Density peaks in Triton: distances, densities, the way to what is denser, and the nearest centre."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.rows import MATRIX_LIMIT, row_blocks

_TILE = 32
_CHANNELS = 8
"""Channels whose differences one program holds for a tile of pairs."""
_STATE = 8192
"""Distances that one program holds."""
_HELD = 1 << 26
"""Distances of the batch that are held at once (256 MiB), beyond as many rows as all of whose distances are held."""


def dpc_knn(features: Tensor, clusters: int, neighbours: int, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster the rows of each image; arguments and result as of the operation, with counts as int32."""
    features = features.contiguous()
    batch, total, _ = features.shape
    device = features.device
    density, apart, farthest = (torch.empty(batch, total, device=device) for _ in range(3))
    padded = triton.next_power_of_2(total)
    rows = max(1, min(16, _STATE // padded))
    warps = 4 if padded <= _STATE else 16
    place = torch.arange(total, device=device).expand(batch, -1)
    padding = place >= counts[:, None]
    whole = total <= MATRIX_LIMIT
    parts = [slice(0, total)] if whole else list(row_blocks(total, batch * total, _HELD))
    sizes = {"ROWS": rows, "BLOCK": padded, "num_warps": warps}
    with torch.cuda.device_of(features):
        for part in parts:
            distance = _apart_from(features[:, part], features, counts - part.start, counts)
            grid = (triton.cdiv(distance.shape[1], rows), batch)
            _density[grid](distance, counts, density, part.start, part.stop, total, neighbours, **sizes)
        rank = torch.empty_like(place, memory_format=torch.contiguous_format)
        rank.scatter_(1, _highest_first(density), place)
        for part in parts:
            if not whole:
                distance = _apart_from(features[:, part], features, counts - part.start, counts)
            grid = (triton.cdiv(distance.shape[1], rows), batch)
            _apart[grid](distance, counts, rank, apart, farthest, part.start, part.stop, total, **sizes)
        apart = torch.where(apart.isinf(), farthest.amax(dim=1, keepdim=True), apart)
        # The logarithm is taken in torch, where both forms take the same one.
        score = (density + apart.log()).masked_fill(padding, -torch.inf)
        centres = torch.full((batch, clusters), -1, dtype=torch.int64, device=device)
        found = _highest_first(score)[:, :clusters]
        centres[:, : found.shape[1]] = torch.where(place[:, : found.shape[1]] < counts[:, None], found, -1)
        owner = torch.empty(batch, total, dtype=torch.int64, device=device)
        middle = features.gather(1, found[..., None].expand(-1, -1, features.shape[2]))
        for part in row_blocks(total, batch * found.shape[1], _HELD):
            own = counts - part.start
            distance = _apart_from(middle, features[:, part], counts, own)
            grid = (triton.cdiv(distance.shape[2], _TILE), batch)
            _nearest[grid](
                distance, counts, centres, owner, part.start, part.stop, total, clusters, found.shape[1], BLOCK=_TILE
            )
    return centres, owner, score


def _apart_from(ours: Tensor, theirs: Tensor, our_counts: Tensor, their_counts: Tensor) -> Tensor:
    """Compute distances ``[B, M, N]`` of ``[B, M, D]`` and ``[B, N, D]``, of as many rows of each as count."""
    (batch, height, width), total = ours.shape, theirs.shape[1]
    distance = torch.empty(batch, height, total, device=ours.device)
    _distances[(triton.cdiv(height, _TILE), triton.cdiv(total, _TILE), batch)](
        ours, theirs, our_counts, their_counts, distance, ours.stride(0), theirs.stride(0),
        height, total, width, width**0.5, TILE=_TILE, CHANNELS=_CHANNELS,
    )  # fmt: skip
    return distance


def _highest_first(values: Tensor) -> Tensor:
    # Padding is -inf and comes after every row, so it comes last among equals too.
    return values.sort(dim=1, descending=True, stable=True).indices


@triton.jit(do_not_specialize=["our_stride", "their_stride", "height", "total", "width", "root"])
def _distances(
    ours,
    theirs,
    our_counts,
    their_counts,
    distance,
    our_stride,
    their_stride,
    height,
    total,
    width,
    root,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums of squared differences, not products: what hidden states share would swallow small distances."""
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < height) & (row < tl.load(our_counts + image))
    exists = (column < total) & (column < tl.load(their_counts + image))
    whole = tl.zeros([TILE, TILE], dtype=tl.float32)
    for start in range(0, width, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        seen = (channel < width)[None, :]
        at = ours + image * our_stride + row[:, None] * width + channel[None, :]
        own = tl.load(at, mask=inside[:, None] & seen, other=0.0).to(tl.float32)
        at = theirs + image * their_stride + column[:, None] * width + channel[None, :]
        other = tl.load(at, mask=exists[:, None] & seen, other=0.0).to(tl.float32)
        apart = own[:, None, :] - other[None, :, :]
        whole += tl.sum(apart * apart, axis=2)
    found = tl.math.div_rn(tl.math.sqrt_rn(whole), tl.full([TILE, TILE], root, dtype=tl.float32))
    at = distance + (image * height + row)[:, None] * total + column[None, :]
    tl.store(at, found, mask=inside[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["first", "behind", "total", "neighbours"])
def _density(
    distance, counts, density, first, behind, total, neighbours, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Mean squares of the smallest distances of some rows, of those from ``first`` to before ``behind``."""
    image = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + image)
    row = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = ((row < count) & (row < behind))[:, None] & (column < count)[None, :]
    at = distance + (image * (behind - first) + row - first)[:, None] * total + column[None, :]
    left = tl.load(at, mask=inside, other=float("inf"))
    wanted = tl.minimum(neighbours, count)
    whole = tl.zeros([ROWS], dtype=tl.float32)
    for _ in range(wanted):
        least = tl.min(left, axis=1)
        whole += least * least
        lowest = tl.min(tl.where(left == least[:, None], column[None, :], BLOCK), axis=1)
        left = tl.where(column[None, :] == lowest[:, None], float("inf"), left)
    found = -tl.math.div_rn(whole, tl.full([ROWS], 0.0, dtype=tl.float32) + tl.maximum(wanted, 1))
    tl.store(density + image * total + row, tl.where(row < count, found, -float("inf")), mask=row < behind)


@triton.jit(do_not_specialize=["first", "behind", "total"])
def _apart(
    distance, counts, rank, apart, farthest, first, behind, total, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """How far it is from some rows to the nearest that is denser, and to the farthest of all."""
    image = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + image)
    row = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    real = (row < count) & (row < behind)
    inside = real[:, None] & (column < count)[None, :]
    at = distance + (image * (behind - first) + row - first)[:, None] * total + column[None, :]
    found = tl.load(at, mask=inside, other=0.0)
    own = tl.load(rank + image * total + row, mask=real, other=0)
    theirs = tl.load(rank + image * total + column, mask=column < count, other=0)
    denser = inside & (theirs[None, :] < own[:, None])
    nearest = tl.min(tl.where(denser, found, float("inf")), axis=1)
    tl.store(apart + image * total + row, nearest, mask=row < behind)
    tl.store(farthest + image * total + row, tl.max(found, axis=1), mask=row < behind)


@triton.jit(do_not_specialize=["first", "behind", "total", "clusters", "height"])
def _nearest(distance, counts, centres, owner, first, behind, total, clusters, height, BLOCK: tl.constexpr):
    """The nearest centre of some rows."""
    image = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + image)
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = first + local
    inside = (row < count) & (row < behind)
    least = tl.full([BLOCK], float("inf"), dtype=tl.float32)
    found = tl.zeros([BLOCK], dtype=tl.int32)
    own = tl.full([BLOCK], -1, dtype=tl.int32)
    for cluster in range(tl.minimum(height, count)):
        centre = tl.load(centres + image * clusters + cluster)
        away = tl.load(distance + (image * height + cluster) * (behind - first) + local, mask=inside, other=0.0)
        # Only what is nearer replaces, so the best of equally near centres stays.
        found = tl.where(away < least, cluster, found)
        least = tl.minimum(least, away)
        own = tl.where(row == centre, cluster, own)
    found = tl.where(own >= 0, own, found)
    tl.store(owner + image * total + row, tl.where(inside, found, -1).to(tl.int64), mask=row < behind)
