"""Bipartite matching and averages by size in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.kernels.rows import normalised, row_blocks, sum_by_group

_LEAST = 1e-30
"""Stands for the size of groups without members, so that their averages are zeros."""


def partners(metric: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Find for each row at an even place the most similar row at an odd place.

    Args:
        metric: ``[B, N, d]``.
        lengths: rows of each image that are no padding.

    Returns:
        float32 ``[B, ceil(N / 2)]`` similarity, -inf for padding and where there is no odd row, and int64
        ``[B, ceil(N / 2)]``, the place of the partner among the odd rows, 0 there.

    Example:
        >>> closeness, partner = partners(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [3.0, 0.0]]]), [4])
        >>> closeness.tolist(), partner.tolist()
        ([[1.0, 1.0]], [[1, 0]])
    """
    shape = len(lengths), (metric.shape[1] + 1) // 2
    closeness = torch.full(shape, -torch.inf, device=metric.device)
    partner = torch.zeros(shape, dtype=torch.int64, device=metric.device)
    for image, length in enumerate(lengths):
        if length < 2:
            continue
        unit = normalised(metric[image, :length])
        even, odd = unit[0::2], unit[1::2].contiguous()
        for part in row_blocks(even.shape[0], odd.shape[0]):
            found = (even[part].contiguous() @ odd.T).max(dim=1)
            closeness[image, part], partner[image, part] = found.values, found.indices
    return closeness, partner


def unjoined(counts: Tensor, total: int, kept: int) -> tuple[Tensor, Tensor]:
    """Return what matching gives when nothing is joined.

    Args:
        counts: int32 ``[B]``, rows of each image.
        total: number N of rows with padding.
        kept: the most rows of an image.

    Example:
        >>> [part.tolist() for part in unjoined(torch.tensor([2, 1]), 3, 2)]
        [[[0, 1], [0, -1]], [[0, 1, -1], [0, -1, -1]]]
    """
    everything = torch.arange(total, device=counts.device)
    source = torch.where(everything < counts[:, None], everything, -1)
    return source[:, :kept], source


def join(
    closeness: Tensor, partner: Tensor, counts: Tensor, merges: int, total: int, kept: int, *, class_token: bool
) -> tuple[Tensor, Tensor]:
    """Join the closest pairs of each image, all images at once.

    Args:
        closeness: as of :func:`partners`.
        partner: as of :func:`partners`.
        counts: int32 ``[B]``, rows of each image.
        merges: how many pairs of each are joined, if it has as many.
        total: number N of rows with padding.
        kept: the most rows of an image that are left.
        class_token: the first row takes no part, and what is not joined keeps its order.

    Returns:
        As :func:`~mmfast.kernels.bipartite_merge.bipartite_match`.

    Example:
        >>> closeness, partner = torch.tensor([[0.5, 0.9]]), torch.tensor([[0, 1]])
        >>> [part.tolist() for part in join(closeness, partner, torch.tensor([4]), 1, 4, 3, class_token=False)]
        [[[0, 1, 3]], [[0, 1, 2, 2]]]
    """
    row = torch.arange(total, device=closeness.device)
    length = counts.long()[:, None]
    joined = ((length - int(class_token)) // 2).clamp(0, merges)
    stays = (length + 1) // 2 - joined
    if class_token:
        closeness = closeness.index_fill(1, row[:1], -torch.inf)
    # Padding is minus infinity and comes last among equals too.
    rank = closeness.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    goes = rank < joined
    place = (~goes).cumsum(dim=1) - 1 if class_token else rank - joined
    # [B, N]: even rows stay or go to their partner, odd rows follow those that stay.
    half, odd = row // 2, row % 2 == 1
    source = torch.where(odd, stays + half, torch.where(goes, stays + partner, place)[:, half])
    untouched, leaves = joined == 0, torch.where(odd, False, goes[:, half])
    source = torch.where(untouched, row, source).masked_fill(row >= length, -1)
    # What goes, and padding, is written to a place behind all others, which is cut off.
    target = source.masked_fill((leaves & ~untouched) | (source < 0), kept)
    places = torch.full((closeness.shape[0], kept + 1), -1, dtype=torch.int64, device=closeness.device)
    return places.scatter_(1, target, row.expand_as(target))[:, :kept], source


def average_groups(features: Tensor, sizes: Tensor | None, source: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Average the rows of each group; arguments and result as of the operation."""
    merged, summed = [], []
    for image, group in enumerate(source):
        values, weight = features[image].float(), None if sizes is None else sizes[image].float()
        alive = group >= 0
        # Left out, not weighed with 0: padding may hold anything.
        if not bool(alive.all()):
            values, group, weight = values[alive], group[alive], None if weight is None else weight[alive]
        if weight is None:
            total = torch.bincount(group, minlength=groups).float()[:, None]
            whole = sum_by_group(values, group, groups)
        else:
            total = sum_by_group(weight[:, None], group, groups)
            whole = sum_by_group(values * weight[:, None], group, groups)
        merged.append(whole.div_(total.clamp_min(_LEAST)).to(features.dtype))
        summed.append(total[:, 0])
    if len(merged) == 1:
        return merged[0][None], summed[0][None]
    return torch.stack(merged), torch.stack(summed)
