"""Density peaks in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mmfast.kernels.rows import MATRIX_LIMIT, row_blocks

_SAME = 1e-12
"""Share of the largest square below which a squared distance is rounding error, and the rows are the same."""


def dpc_knn(features: Tensor, clusters: int, neighbours: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster the rows of each image; arguments and result as of the operation, with counts as numbers."""
    batch, total, _ = features.shape
    device = features.device
    centres = torch.full((batch, clusters), -1, dtype=torch.int64, device=device)
    owner = torch.full((batch, total), -1, dtype=torch.int64, device=device)
    score = torch.full((batch, total), -torch.inf, device=device)
    for image, length in enumerate(lengths):
        if length:
            found = _peaks(features[image, :length], min(clusters, length), min(neighbours, length))
            centres[image, : min(clusters, length)], owner[image, :length], score[image, :length] = found
    return centres, owner, score


def _peaks(features: Tensor, clusters: int, neighbours: int) -> tuple[Tensor, Tensor, Tensor]:
    total, device = features.shape[0], features.device
    blocks = _distances(features)
    # The logarithm of the density: far-flung states would all have density 0 in single precision.
    near = [block.topk(neighbours, dim=-1, largest=False).values.square().mean(dim=-1) for _, block in blocks()]
    density = -torch.cat(near)
    rank = torch.empty(total, dtype=torch.int64, device=device)
    rank[_highest_first(density)] = torch.arange(total, device=device)
    apart, farthest = torch.empty(total, device=device), torch.zeros((), device=device)
    for part, block in blocks():
        apart[part] = block.masked_fill(rank >= rank[part, None], torch.inf).amin(dim=-1)
        farthest = torch.maximum(farthest, block.max())
    score = density + torch.where(apart.isinf(), farthest, apart).log()
    centres = _highest_first(score)[:clusters]
    owner = torch.cat([block[:, centres].argmin(dim=1) for _, block in blocks()])
    owner[centres] = torch.arange(clusters, device=device)
    return centres, owner, score


def _distances(features: Tensor) -> Callable[[], Iterator[tuple[slice, Tensor]]]:
    """Return what goes through the distances, some rows at a time; while all of them can be held, they are."""
    total, width = features.shape
    # By way of products, which is many times faster; in double precision, since hidden states share a large part.
    values = features.double()
    values = values - values.mean(dim=0)
    square = values.square().sum(dim=-1)
    least = _SAME * square.max()

    def rows(part: slice) -> Tensor:
        found = square[part, None] + square - 2 * (values[part] @ values.T)
        return (found.masked_fill(found < least, 0.0) / width).sqrt().float()

    if total <= MATRIX_LIMIT:
        whole = rows(slice(0, total))
        return lambda: iter([(slice(0, total), whole)])
    return lambda: ((part, rows(part)) for part in row_blocks(total, total))


def _highest_first(values: Tensor) -> Tensor:
    return values.sort(descending=True, stable=True).indices
