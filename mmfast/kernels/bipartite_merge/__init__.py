"""Join the most similar pairs of rows at even and odd places, and average them by size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.kernels.bipartite_merge import reference
from mmfast.kernels.checks import check_shape, check_whole, gradient_refusal
from mmfast.kernels.dispatch import chosen, refusal_of
from mmfast.kernels.rows import RowCounts, check_count

__all__ = ["Merged", "average_groups", "bipartite_match", "bipartite_merge"]


class Merged(NamedTuple):
    """What is left of a batch after merging.

    Attributes:
        features: ``[B, M, C]`` in the dtype of the input, zeros where an image has fewer than M rows.
        sizes: float32 ``[B, M]``, summed; 0 there.
        places: int64 ``[B, M]``, input rows that the outputs stand at; -1 there.
        source: int64 ``[B, N]``, the output each input row went into; -1 for padding.
    """

    features: Tensor
    sizes: Tensor
    places: Tensor
    source: Tensor


def bipartite_match(
    metric: Tensor, merges: int, *, counts: Tensor | None = None, class_token: bool = False
) -> tuple[Tensor, Tensor]:
    """Pair rows at even places with their most similar rows at odd places, and join the closest pairs.

    Paper: "Token Merging: Your ViT But Faster" (arXiv 2210.09461, facebookresearch/ToMe).

    Args:
        metric: ``[B, N, d]`` what similarity, the cosine in float32, is measured on.
        merges: how many even rows are joined; at most half of an image's rows (after the class token) can be.
        counts: int32 or int64 ``[B]``, rows of each image that are no padding; None = all. How large the result is
            hangs on them: on a GPU they are waited for.
        class_token: the first row takes no part, and what is not joined keeps its order.

    Returns:
        ``(places, source)``: int64 ``[B, M]`` input rows that the outputs stand at, the even ones that are left (by
        descending similarity, or in their order with a class token) before the odd ones, then -1 where another image
        has more; and int64 ``[B, N]``, the output that each input row goes into, -1 for padding. Ties go to the
        lower index. An image in which nothing can be joined keeps its order.

    Raises:
        ValueError: if a shape, ``merges`` or a count does not fit.
        TypeError: if a dtype does not fit.

    Example:
        >>> places, source = bipartite_match(torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]]), 1)
        >>> places.tolist(), source.tolist()
        ([[2, 1]], [[1, 1, 0]])
    """
    lengths = RowCounts(metric, counts, name="metric")
    check_count("merges", merges)
    numbers = lengths.numbers()
    joined = [max(0, min(merges, (length - class_token) // 2)) for length in numbers]
    kept = max((length - fewer for length, fewer in zip(numbers, joined, strict=True)), default=0)
    if not any(joined):
        return reference.unjoined(lengths.tensor(), metric.shape[1], kept)
    if chosen("bipartite_merge", refusal_of(metric)) == "triton":
        from mmfast.kernels.bipartite_merge.triton import partners

        found = partners(metric.detach(), lengths.tensor())
    else:
        found = reference.partners(metric.detach(), numbers)
    return reference.join(*found, lengths.tensor(), merges, metric.shape[1], kept, class_token=class_token)


def average_groups(features: Tensor, sizes: Tensor | None, source: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Average the rows of each group, weighing each by its size, in float32 and always in the same order.

    Args:
        features: ``[B, N, C]``.
        sizes: ``[B, N]``, positive; None = ones.
        source: int64 ``[B, N]`` in ``0..groups-1``; rows of group -1 are left out.
        groups: number M of groups.

    Returns:
        ``[B, M, C]`` in the dtype of the input, and the summed sizes, float32 ``[B, M]``; zeros for groups without
        members.

    Raises:
        ValueError: if a shape or ``groups`` does not fit.
        TypeError: if a dtype does not fit.

    Example:
        >>> features, sizes = torch.tensor([[[3.0], [0.0], [1.0]]]), torch.tensor([[2.0, 1.0, 1.0]])
        >>> merged, sizes = average_groups(features, sizes, torch.tensor([[0, 0, 1]]), 2)
        >>> merged.tolist(), sizes.tolist()
        ([[[2.0], [1.0]]], [[3.0, 1.0]])
    """
    RowCounts(features, None)
    batch, total = features.shape[:2]
    if sizes is not None:
        check_shape("sizes", sizes, "B N", B=batch, N=total)
    check_shape("source", source, "B N", B=batch, N=total)
    check_whole("source", source)
    check_count("groups", groups)
    refusal = refusal_of(features, sizes, source) or gradient_refusal(features, sizes)
    if features.numel() == 0 or groups == 0:
        return features.new_zeros(batch, groups, features.shape[2]), torch.zeros(batch, groups, device=features.device)
    if chosen("bipartite_merge", refusal) == "triton":
        from mmfast.kernels.bipartite_merge.triton import average_groups as fast

        return fast(features, sizes, source, groups)
    return reference.average_groups(features, sizes, source, groups)


def bipartite_merge(
    features: Tensor,
    merges: int,
    *,
    metric: Tensor | None = None,
    sizes: Tensor | None = None,
    counts: Tensor | None = None,
    class_token: bool = False,
) -> Merged:
    """Join the most similar pairs of rows, each average weighted by what its rows stand for.

    Args:
        features: ``[B, N, C]`` what is averaged.
        merges: as of :func:`bipartite_match`.
        metric: ``[B, N, d]`` what similarity is measured on; None = the features.
        sizes: ``[B, N]``, positive, how many tokens each row stands for; None = one.
        counts: as of :func:`bipartite_match`.
        class_token: as of :func:`bipartite_match`.

    Returns:
        What is left, in the order of :func:`bipartite_match`.

    Raises:
        ValueError: if a shape, ``merges`` or a count does not fit.
        TypeError: if a dtype does not fit.

    Example:
        >>> merged = bipartite_merge(torch.tensor([[[2.0, 0.0], [4.0, 0.0], [0.0, 1.0]]]), 1)
        >>> merged.features.tolist(), merged.sizes.tolist()
        ([[[0.0, 1.0], [3.0, 0.0]]], [[1.0, 2.0]])
    """
    places, source = bipartite_match(
        features if metric is None else metric, merges, counts=counts, class_token=class_token
    )
    return Merged(*average_groups(features, sizes, source, places.shape[1]), places, source)
