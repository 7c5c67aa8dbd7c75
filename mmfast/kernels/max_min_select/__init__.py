"""Pick rows so that the smallest cosine distance between picks is large."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.kernels.dispatch import chosen, refusal_of
from mmfast.kernels.max_min_select import reference
from mmfast.kernels.rows import MATRIX_LIMIT, RowCounts, check_count

__all__ = ["max_min_select"]


def max_min_select(
    features: Tensor, kept: int, *, counts: Tensor | None = None, matrix_limit: int = MATRIX_LIMIT
) -> Tensor:
    """Pick rows greedily, each as far as possible from all picks before it.

    The first pick is the row whose nearest neighbour is farthest; each next one is the row whose nearest pick is
    farthest. Distance is 1 - cosine similarity, in float32. No row is picked twice. Fewer picks are the beginning
    of more.

    Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (arXiv 2503.02175,
    vbdi/divprune).

    Args:
        features: ``[B, N, D]``, any float dtype.
        kept: number K of picks.
        counts: int32 or int64 ``[B]``, rows of each image that are no padding; None = all.
        matrix_limit: up to how many rows all similarities of an image are held; above, they are computed when needed.

    Returns:
        int64 ``[B, K]`` in order of picking, -1 once an image has no row left. Ties go to the lower index.

    Raises:
        ValueError: if a shape, ``kept``, ``matrix_limit`` or a count does not fit.
        TypeError: if a dtype does not fit.

    Example:
        >>> features = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]]).repeat(2, 1, 1)
        >>> max_min_select(features, 3, counts=torch.tensor([3, 2])).tolist()
        [[2, 0, 1], [0, 1, -1]]
    """
    lengths = RowCounts(features, counts)
    check_count("kept", kept)
    check_count("matrix_limit", matrix_limit)
    if 0 in features.shape[:2] or kept == 0:
        return torch.full((len(features), kept), -1, dtype=torch.int64, device=features.device)
    if chosen("max_min_select", refusal_of(features)) == "triton":
        from mmfast.kernels.max_min_select.triton import max_min_select as fast

        return fast(features.detach(), kept, lengths.tensor(), matrix_limit)
    return reference.max_min_select(features, kept, lengths.numbers(), matrix_limit)
