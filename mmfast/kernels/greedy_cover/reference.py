"""Greedy coverage in plain torch.

What a row adds can only shrink as others are picked, so an old value bounds it from above: only rows whose bound could
still win are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmfast.kernels.rows import Cosines, row_blocks

CANDIDATES = 64
"""Rows whose gain is computed at once."""


def greedy_cover(
    weights: Tensor,
    kept: int,
    lengths: Sequence[int],
    saliency: Tensor | None,
    combine: str,
    excluded: Tensor | None,
) -> Tensor:
    """Pick ``kept`` rows of each image; arguments and result as of the operation, with counts as numbers."""
    picks = torch.full((len(lengths), kept), -1, dtype=torch.int64, device=weights.device)
    for image, length in enumerate(lengths):
        own = weights[image, :length].float()
        wanted = min(kept, length if excluded is None else length - int(excluded[image, :length].sum()))
        if wanted == 0:
            continue
        rated = _rated(saliency, image, combine)
        bound = rated(own.sum(dim=1), slice(0, length))
        if excluded is not None:
            bound[excluded[image, :length]] = -torch.inf
        covered = own.new_zeros(own.shape[1])
        picks[image, :wanted] = _lazily(own.__getitem__, bound, covered, rated, wanted)
    return picks


def greedy_cover_cosine(
    features: Tensor, kept: int, lengths: Sequence[int], saliency: Tensor | None, combine: str, matrix_limit: int
) -> Tensor:
    """Pick ``kept`` rows of each image; arguments and result as of the operation, with counts as numbers."""
    picks = torch.full((len(lengths), kept), -1, dtype=torch.int64, device=features.device)
    for image, length in enumerate(lengths):
        wanted = min(kept, length)
        if wanted == 0:
            continue
        cosines = Cosines(features[image, :length], matrix_limit)
        rated = _rated(saliency, image, combine)
        everyone = torch.arange(length, device=features.device)
        blocks = (everyone[part] for part in row_blocks(length, length))
        bound = torch.cat([rated(_gain(cosines.between(rows), 0.0), rows) for rows in blocks])
        covered = torch.zeros(length, device=features.device)
        picks[image, :wanted] = _lazily(cosines.between, bound, covered, rated, wanted)
    return picks


def _gain(weights: Tensor, covered: Tensor | float) -> Tensor:
    return (weights - covered).clamp_min_(0.0).sum(dim=1)


def _rated(saliency: Tensor | None, image: int, combine: str) -> Callable[[Tensor, Tensor | slice], Tensor]:
    """Combine the gain of rows with what else speaks for them."""
    if saliency is None:
        return lambda gain, rows: gain
    own = saliency[image].float()
    if combine == "multi":
        return lambda gain, rows: gain * own[rows]
    return lambda gain, rows: gain + own[rows]


def _lazily(
    weights: Callable[[Tensor], Tensor],
    bound: Tensor,
    covered: Tensor,
    rated: Callable[[Tensor, Tensor | slice], Tensor],
    kept: int,
) -> Tensor:
    total = bound.numel()
    picks = torch.empty(kept, dtype=torch.int64, device=bound.device)
    fresh = torch.ones(total, dtype=torch.bool, device=bound.device)
    for step in range(kept):
        pick = bound.argmax()
        while not fresh[pick]:
            stale = bound.masked_fill(fresh, -torch.inf).topk(min(CANDIDATES, total)).indices
            bound[stale] = torch.where(fresh[stale], bound[stale], rated(_gain(weights(stale), covered), stale))
            fresh[stale] = True
            pick = bound.argmax()
        picks[step] = pick
        bound[pick] = -torch.inf
        covered = torch.maximum(covered, weights(pick))
        fresh = bound.isneginf()
    return picks
