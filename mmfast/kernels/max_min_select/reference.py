"""Max-min selection in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.kernels.rows import normalised, row_blocks


def max_min_select(features: Tensor, kept: int, lengths: Sequence[int], matrix_limit: int) -> Tensor:
    """Pick ``kept`` rows of each image; arguments and result as of the operation, with counts as numbers."""
    picks = torch.full((len(lengths), kept), -1, dtype=torch.int64, device=features.device)
    for image, length in enumerate(lengths):
        wanted = min(kept, length)
        if wanted:
            picks[image, :wanted] = _order(normalised(features[image, :length]), wanted, matrix_limit)
    return picks


def _order(unit: Tensor, kept: int, matrix_limit: int) -> Tensor:
    total = unit.shape[0]
    if total <= matrix_limit:
        similarity = unit @ unit.T
        similarity.fill_diagonal_(-torch.inf)
        nearest = similarity.amax(dim=0)
    else:
        similarity = None
        nearest = nearest_similarity(unit)
    picks = torch.empty(kept, dtype=torch.int64, device=unit.device)
    # Maximising the smallest distance is minimising the largest similarity.
    pick = nearest.argmin()
    picks[0] = pick
    largest = torch.full((total,), -torch.inf, device=unit.device)
    for step in range(1, kept):
        row = unit @ unit[pick] if similarity is None else similarity[pick]
        torch.maximum(largest, row, out=largest)
        largest[pick] = torch.inf
        pick = largest.argmin()
        picks[step] = pick
    return picks


def nearest_similarity(unit: Tensor) -> Tensor:
    """Return the cosine similarity of each row to its nearest other row, computed in blocks of bounded size.

    Args:
        unit: float32 ``[N, D]``, rows of length one; a single row is similar to nothing, -inf.

    Returns:
        float32 ``[N]``.

    Example:
        >>> nearest_similarity(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])).tolist()
        [0.0, 1.0, 1.0]
    """
    total = unit.shape[0]
    nearest = torch.empty(total, device=unit.device)
    for part in row_blocks(total, total):
        rows = unit[part] @ unit.T
        local = torch.arange(rows.shape[0], device=unit.device)
        rows[local, local + part.start] = -torch.inf
        nearest[part] = rows.amax(dim=1)
    return nearest
