"""Density peaks in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dpc_knn(features: Tensor, clusters: int, neighbours: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster the rows of each image; arguments and result as of the operation, with counts as numbers."""
    batch, total, _ = features.shape
    device = features.device
    centres = torch.full((batch, clusters), -1, dtype=torch.int64, device=device)
    owner = torch.full((batch, total), -1, dtype=torch.int64, device=device)
    score = torch.full((batch, total), -torch.inf, device=device)
    for image, length in enumerate(lengths):
        if length:
            found = _peaks(features[image, :length].float(), min(clusters, length), min(neighbours, length))
            centres[image, : min(clusters, length)], owner[image, :length], score[image, :length] = found
    return centres, owner, score


def _peaks(values: Tensor, clusters: int, neighbours: int) -> tuple[Tensor, Tensor, Tensor]:
    total = values.shape[0]
    # Not by way of products: hidden states share a large part, beside which small distances would be lost.
    distance = torch.cdist(values[None], values[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
    distance = distance / values.shape[1] ** 0.5
    near = distance.topk(neighbours, dim=-1, largest=False).values
    # The logarithm of the density: far-flung states would all have density 0 in single precision.
    density = -near.square().mean(dim=-1)
    rank = torch.empty(total, dtype=torch.int64, device=values.device)
    rank[_highest_first(density)] = torch.arange(total, device=values.device)
    apart = distance.masked_fill(rank >= rank[:, None], torch.inf).amin(dim=-1)
    apart = torch.where(apart.isinf(), distance.max(), apart)
    score = density + apart.log()
    centres = _highest_first(score)[:clusters]
    owner = distance[centres].argmin(dim=0)
    owner[centres] = torch.arange(clusters, device=values.device)
    return centres, owner, score


def _highest_first(values: Tensor) -> Tensor:
    return values.sort(descending=True, stable=True).indices
