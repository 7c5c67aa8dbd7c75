"""Pick rows so that everything is covered as well as possible."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmfast.kernels.checks import check_bool, check_shape
from mmfast.kernels.dispatch import chosen, refusal_of
from mmfast.kernels.greedy_cover import reference
from mmfast.kernels.rows import MATRIX_LIMIT, RowCounts, check_count

__all__ = ["Combine", "greedy_cover", "greedy_cover_cosine"]

Combine = Literal["multi", "add"]


def greedy_cover(
    weights: Tensor,
    kept: int,
    *,
    counts: Tensor | None = None,
    saliency: Tensor | None = None,
    combine: Combine = "multi",
    excluded: Tensor | None = None,
) -> Tensor:
    """Pick rows one by one, each adding most to the sum of the best weights so far.

    Paper: "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs" (arXiv 2508.18264,
    Ironieser/MMTok).

    Args:
        weights: ``[B, N, R]``, 0 or more: how well each row covers each of R things.
        kept: number K of picks.
        counts: int32 or int64 ``[B]``, rows of each image that are no padding; None = all. Things are not counted:
            padding among them has to have weight 0.
        saliency: ``[B, N]``, not negative, what the gain of a row is combined with; None = nothing.
        combine: ``"multi"`` multiplies gain and saliency, ``"add"`` adds them.
        excluded: bool ``[B, N]``, True where a row may not be picked.

    Returns:
        int64 ``[B, K]`` in order of picking, -1 once an image has no row left. Ties go to the lower index.

    Raises:
        ValueError: if a shape, ``kept``, ``combine`` or a count does not fit.
        TypeError: if a dtype does not fit.

    Example:
        >>> greedy_cover(torch.tensor([[[0.5, 0.0], [0.4, 0.4], [0.0, 0.3]]]), 2).tolist()
        [[1, 0]]
    """
    lengths = RowCounts(weights, counts, name="weights", axes="B N R")
    _check(kept, combine, saliency, *weights.shape[:2])
    if excluded is not None:
        check_shape("excluded", excluded, "B N", B=weights.shape[0], N=weights.shape[1])
        check_bool("excluded", excluded)
    if 0 in weights.shape[:2] or kept == 0:
        return torch.full((len(weights), kept), -1, dtype=torch.int64, device=weights.device)
    if chosen("greedy_cover", refusal_of(weights, saliency, excluded)) == "triton":
        from mmfast.kernels.greedy_cover.triton import greedy_cover as fast

        return fast(weights.detach(), kept, lengths.tensor(), saliency, combine, excluded)
    return reference.greedy_cover(weights, kept, lengths.numbers(), saliency, combine, excluded)


def greedy_cover_cosine(
    features: Tensor,
    kept: int,
    *,
    counts: Tensor | None = None,
    saliency: Tensor | None = None,
    combine: Combine = "multi",
    matrix_limit: int = MATRIX_LIMIT,
) -> Tensor:
    """Pick rows one by one, each adding most to the coverage of all rows by similar ones.

    A row is covered as far as the pick of highest cosine similarity is similar to it.

    Paper: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs" (arXiv 2510.24214,
    kinredon/SCOPE).

    Args:
        features: ``[B, N, D]``, any float dtype.
        kept: number K of picks.
        counts: int32 or int64 ``[B]``, rows of each image that are no padding; None = all.
        saliency: as of :func:`greedy_cover`.
        combine: as of :func:`greedy_cover`.
        matrix_limit: up to how many rows all similarities of an image are held; above, torch computes those it needs.

    Returns:
        As :func:`greedy_cover`.

    Raises:
        ValueError: if a shape, ``kept``, ``combine``, ``matrix_limit`` or a count does not fit.
        TypeError: if a dtype does not fit.

    Example:
        >>> greedy_cover_cosine(torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]]), 2).tolist()
        [[1, 2]]
    """
    lengths = RowCounts(features, counts)
    _check(kept, combine, saliency, *features.shape[:2])
    check_count("matrix_limit", matrix_limit)
    if 0 in features.shape[:2] or kept == 0:
        return torch.full((len(features), kept), -1, dtype=torch.int64, device=features.device)
    refusal = refusal_of(features, saliency)
    if not refusal and features.shape[1] > matrix_limit:
        # Every gain anew would be the whole matrix for every pick; the torch form looks only at what could still win.
        refusal = f"more than matrix_limit={matrix_limit} rows, which only torch searches lazily"
    if chosen("greedy_cover_cosine", refusal) == "triton":
        from mmfast.kernels.greedy_cover.triton import greedy_cover_cosine as fast

        return fast(features.detach(), kept, lengths.tensor(), saliency, combine)
    return reference.greedy_cover_cosine(features, kept, lengths.numbers(), saliency, combine, matrix_limit)


def _check(kept: int, combine: str, saliency: Tensor | None, batch: int, total: int) -> None:
    check_count("kept", kept)
    if combine not in ("multi", "add"):
        raise ValueError(f"combine={combine!r} must be one of 'multi', 'add'")
    if saliency is not None:
        check_shape("saliency", saliency, "B N", B=batch, N=total)
