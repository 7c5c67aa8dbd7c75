"""Cluster rows around density peaks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmfast.kernels.dispatch import chosen, refusal_of
from mmfast.kernels.dpc_knn import reference
from mmfast.kernels.rows import RowCounts, check_count

__all__ = ["Peaks", "dpc_knn"]


class Peaks(NamedTuple):
    """Clusters of a batch.

    Attributes:
        centres: int64 ``[B, K]``, the row in the middle of each cluster, the best first; -1 where an image has fewer
            than K rows.
        owner: int64 ``[B, N]``, the cluster of each row; -1 for padding.
        score: float32 ``[B, N]``, how well each row does as a centre, as a logarithm; -inf for padding.
    """

    centres: Tensor
    owner: Tensor
    score: Tensor


def dpc_knn(features: Tensor, clusters: int, *, neighbours: int | None = None, counts: Tensor | None = None) -> Peaks:
    """Find rows that are dense and far from anything denser, and give every row to the nearest of them.

    The density of a row falls with the mean square of the distances to its nearest rows, itself being one of them.
    Of equally dense rows the lower index counts as denser. Distances are Euclidean, divided by the square root of D,
    in float32.

    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference" (arXiv 2410.04417,
    Gumpest/SparseVLMs).

    Args:
        features: ``[B, N, D]``, any float dtype.
        clusters: number K of clusters, at least 1; an image of fewer rows has as many as rows.
        neighbours: how many nearest rows count for the density; None = as many as clusters.
        counts: int32 or int64 ``[B]``, rows of each image that are no padding; None = all.

    Returns:
        Centres, clusters of all rows, and scores. Ties go to the lower index.

    Raises:
        ValueError: if a shape, ``clusters``, ``neighbours`` or a count does not fit.
        TypeError: if a dtype does not fit.

    Example:
        >>> import torch
        >>> found = dpc_knn(torch.tensor([[[0.0], [2.0], [10.0], [12.0]]]), 2)
        >>> found.centres.tolist(), found.owner.tolist()
        ([[0, 2]], [[0, 0, 1, 1]])
    """
    lengths = RowCounts(features, counts)
    check_count("clusters", clusters, least=1)
    neighbours = clusters if neighbours is None else neighbours
    check_count("neighbours", neighbours, least=1)
    if features.numel() and chosen("dpc_knn", refusal_of(features)) == "triton":
        from mmfast.kernels.dpc_knn.triton import dpc_knn as fast

        return Peaks(*fast(features.detach(), clusters, neighbours, lengths.tensor()))
    return Peaks(*reference.dpc_knn(features, clusters, neighbours, lengths.numbers()))
