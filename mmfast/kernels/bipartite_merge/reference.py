"""Bipartite matching and averages by size in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.kernels.rows import membership, normalised, row_blocks

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


def unjoined(metric: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return what matching gives when nothing is joined; arguments as of :func:`partners`.

    Example:
        >>> [part.tolist() for part in unjoined(torch.zeros(2, 3, 1), [2, 1])]
        [[[0, 1], [0, -1]], [[0, 1, -1], [0, -1, -1]]]
    """
    everything = torch.arange(metric.shape[1], device=metric.device)
    counts = torch.tensor(lengths, dtype=torch.int64, device=metric.device)
    source = torch.where(everything < counts[:, None], everything, -1)
    return source[:, : max(lengths, default=0)], source


def join(
    closeness: Tensor,
    partner: Tensor,
    lengths: Sequence[int],
    joined: Sequence[int],
    total: int,
    *,
    class_token: bool,
) -> tuple[Tensor, Tensor]:
    """Join the closest pairs of each image.

    Args:
        closeness: as of :func:`partners`.
        partner: as of :func:`partners`.
        lengths: rows of each image.
        joined: how many pairs of each are joined.
        total: number N of rows with padding.
        class_token: the first row takes no part, and what is not joined keeps its order.

    Returns:
        As :func:`~mmfast.kernels.bipartite_merge.bipartite_match`.

    Example:
        >>> closeness, partner = torch.tensor([[0.5, 0.9]]), torch.tensor([[0, 1]])
        >>> [part.tolist() for part in join(closeness, partner, [4], [1], 4, class_token=False)]
        [[[0, 1, 3]], [[0, 1, 2, 2]]]
    """
    device = closeness.device
    kept = max(length - merges for length, merges in zip(lengths, joined, strict=True))
    places = torch.full((len(lengths), kept), -1, dtype=torch.int64, device=device)
    source = torch.full((len(lengths), total), -1, dtype=torch.int64, device=device)
    everything = torch.arange(total, device=device)
    for image, (length, merges) in enumerate(zip(lengths, joined, strict=True)):
        if merges == 0:
            places[image, :length] = source[image, :length] = everything[:length]
            continue
        even, odd = everything[0:length:2], everything[1:length:2]
        own = closeness[image, : even.numel()]
        if class_token:
            own = own.clone()
            own[0] = -torch.inf
        order = own.sort(descending=True, stable=True).indices
        goes, stays = order[:merges], order[merges:]
        if class_token:
            stays = stays.sort().values
        places[image, : length - merges] = torch.cat([even[stays], odd])
        source[image, even[stays]] = everything[: stays.numel()]
        source[image, odd] = everything[stays.numel() : length - merges]
        source[image, even[goes]] = partner[image, goes] + stays.numel()
    return places, source


def average_groups(features: Tensor, sizes: Tensor | None, source: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Average the rows of each group; arguments and result as of the operation."""
    merged, summed = [], []
    for image, group in enumerate(source):
        values, weight = features[image].float(), None if sizes is None else sizes[image].float()
        alive = group >= 0
        # Left out, not weighed with 0: padding may hold anything.
        if not bool(alive.all()):
            values, group, weight = values[alive], group[alive], None if weight is None else weight[alive]
        member = membership(group, groups)
        if weight is None:
            total = torch.bincount(group, minlength=groups).float()[:, None]
            whole = member @ values
        else:
            total = member @ weight[:, None]
            whole = member @ (values * weight[:, None])
        merged.append(whole.div_(total.clamp_min(_LEAST)).to(features.dtype))
        summed.append(total[:, 0])
    if len(merged) == 1:
        return merged[0][None], summed[0][None]
    return torch.stack(merged), torch.stack(summed)
