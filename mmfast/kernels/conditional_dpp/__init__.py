"""Choose the likeliest subset of a determinantal point process whose kernel is conditioned on relevance."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.kernels.checks import check_shape
from mmfast.kernels.conditional_dpp import reference
from mmfast.kernels.dispatch import chosen, refusal_of
from mmfast.kernels.rows import RowCounts, check_count

__all__ = ["conditional_dpp"]


def conditional_dpp(features: Tensor, relevance: Tensor, kept: int, *, counts: Tensor | None = None) -> Tensor:
    """Pick rows one by one, each enlarging the determinant of the kernel of all picks most.

    The kernel is the cosine similarity of the rows, scaled on both sides by their relevance; its Cholesky factor
    grows by a row with every pick. A gain below 1e-5 of the row's entry on the diagonal is rounding error and counts
    as none. Once the features span no new direction, as where there are more picks than dimensions, every gain is
    none, and the lowest rows that are left follow; the official code divides by what rounding left there.

    Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs"
    (arXiv 2506.10967, Theia-4869/CDPruner).

    Args:
        features: ``[B, N, D]``, any float dtype.
        relevance: ``[B, N]``, 0 or more.
        kept: number K of picks.
        counts: int32 or int64 ``[B]``, rows of each image that are no padding; None = all.

    Returns:
        int64 ``[B, K]`` in order of picking, -1 once an image has no row left. Ties go to the lower index.

    Raises:
        ValueError: if a shape, ``kept`` or a count does not fit.
        TypeError: if a dtype does not fit.

    Example:
        >>> features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> conditional_dpp(features, torch.ones(1, 3), 2).tolist()
        [[0, 2]]
    """
    lengths = RowCounts(features, counts)
    check_shape("relevance", relevance, "B N", B=features.shape[0], N=features.shape[1])
    check_count("kept", kept)
    if 0 in features.shape[:2] or kept == 0:
        return torch.full((len(features), kept), -1, dtype=torch.int64, device=features.device)
    if chosen("conditional_dpp", refusal_of(features, relevance)) == "triton":
        from mmfast.kernels.conditional_dpp.triton import conditional_dpp as fast

        return fast(features.detach(), relevance.detach(), kept, lengths.tensor())
    return reference.conditional_dpp(features, relevance, kept, lengths.numbers())
