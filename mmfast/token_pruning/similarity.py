"""Small pieces of mathematics that several methods share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from mmfast.tokens import Keep


def normalised(features: Tensor) -> Tensor:
    """Scale rows to length one, in float32; rows of zeros stay zero.

    Args:
        features: ``[..., D]``.

    Example:
        >>> normalised(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    values = features.float()
    unit: Tensor = values / values.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return unit


MATRIX_LIMIT = 4096
"""Up to here one float32 ``N x N`` matrix of similarities is held; above, parts of it are computed when asked for."""
_BLOCK_ELEMENTS = 1 << 24


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Cut ``rows`` rows of ``width`` entries into blocks of bounded size (64 MiB of float32).

    Example:
        >>> [part.stop - part.start for part in row_blocks(5, 1 << 23)]
        [2, 2, 1]
    """
    size = max(1, _BLOCK_ELEMENTS // max(1, width))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class Cosines:
    """Cosine similarities of the rows of a tensor, in float32.

    Args:
        features: ``[N, D]``; rows of zeros have similarity 0 to everything.

    Example:
        >>> cosines = Cosines(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
        >>> cosines.between(torch.tensor([2])).tolist()
        [[0.6000000238418579, 0.800000011920929, 1.0]]
        >>> cosines.nearest(torch.tensor([0, 1]), torch.tensor([1, 2])).tolist()
        [0.6000000238418579, 1.0]
    """

    def __init__(self, features: Tensor) -> None:
        self._unit = normalised(features)
        self._matrix = self._unit @ self._unit.T if len(self) <= MATRIX_LIMIT else None

    def __len__(self) -> int:
        return int(self._unit.shape[0])

    def between(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return ``[R, C]`` similarities; ``columns=None`` means all N. A single row (0-d) gives ``[C]``."""
        if self._matrix is None:
            return self._unit[rows] @ (self._unit if columns is None else self._unit[columns]).T
        return self._matrix[rows] if columns is None else self._matrix[rows[..., None], columns]

    def nearest(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return ``[R]``: the similarity of each row to the most similar of the columns (at least one)."""
        blocks = row_blocks(rows.numel(), columns.numel())
        return torch.cat([self.between(rows[part], columns).amax(dim=1) for part in blocks])


def most_similar(features: Tensor, targets: Tensor) -> Tensor:
    """Find for each row the target of highest cosine similarity; ties go to the earlier target.

    Args:
        features: ``[R, D]``.
        targets: ``[G, D]``, at least one.

    Returns:
        int64 ``[R]`` in ``0..G-1``.

    Example:
        >>> most_similar(torch.tensor([[1.0, 0.1], [0.0, 3.0]]), torch.eye(2)).tolist()
        [0, 1]
    """
    rows, columns = normalised(features), normalised(targets)
    found = [(rows[part] @ columns.T).argmax(dim=1) for part in row_blocks(rows.shape[0], columns.shape[0])]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=features.device)


def sum_by_group(features: Tensor, group: Tensor, groups: int) -> Tensor:
    """Add up the rows of each group, in float32.

    Args:
        features: ``[R, D]``.
        group: int64 ``[R]`` in ``0..groups-1``.
        groups: number of groups.

    Returns:
        float32 ``[groups, D]``; rows of zeros for groups without members.

    Example:
        >>> sum_by_group(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 2]), 3).tolist()
        [[2.0], [0.0], [5.0]]
    """
    # A matrix product, because scattered additions come in any order on a GPU and two runs would differ.
    member = torch.arange(groups, device=group.device)[:, None] == group
    return member.float() @ features.float()


def outliers(values: Tensor, factor: float = 1.5) -> Tensor:
    """Say which values lie above the upper quartile by more than ``factor`` interquartile ranges.

    Args:
        values: any shape, at least one entry.
        factor: how many interquartile ranges.

    Returns:
        bool, of the shape of ``values``.

    Example:
        >>> outliers(torch.tensor([1.0, 2.0, 3.0, 4.0, 50.0])).tolist()
        [False, False, False, False, True]
    """
    exact = values.float()
    lower, upper = torch.quantile(exact.flatten(), exact.new_tensor([0.25, 0.75]))
    above: Tensor = exact > upper + factor * (upper - lower)
    return above


def outlier_share(values: Tensor, factor: float = 1.5) -> float:
    """Return the share of :func:`outliers` among values.

    Args:
        values: any shape, at least one entry.
        factor: how many interquartile ranges.

    Example:
        >>> outlier_share(torch.tensor([1.0, 2.0, 3.0, 4.0, 50.0]))
        0.2
    """
    return int(outliers(values, factor).sum()) / values.numel()


def merged_keep(
    slots: Tensor,
    features: Tensor,
    sizes: Tensor,
    source: Tensor,
    space: Literal["llm", "vision"] = "llm",
    *,
    raster: bool = True,
) -> Keep:
    """Put merged tokens, listed in any order, into ascending slots.

    Args:
        slots: int64 ``[K]``, distinct.
        features: ``[K, D]``.
        sizes: float32 ``[K]``, how many input tokens each stands for.
        source: int64 ``[N]``, for each input token its position in the list, -1 where it was dropped.
        space: as of Keep.
        raster: True moves each feature to its slot; False leaves the features in the order of the list
            and only sorts the slots, which is what official code that appends merged tokens amounts to.

    Example:
        >>> both = torch.tensor([0, 1])
        >>> keep = merged_keep(torch.tensor([3, 1]), torch.eye(2), torch.ones(2), both)
        >>> keep.indices.tolist(), keep.features.tolist(), keep.source.tolist()
        ([1, 3], [[0.0, 1.0], [1.0, 0.0]], [1, 0])
    """
    indices, order = slots.sort()
    if not raster:
        return Keep(indices, features, sizes, source, space)
    moved = torch.where(source >= 0, order.argsort()[source.clamp_min(0)], source)
    return Keep(indices, features[order], sizes[order], moved, space)


def bipartite_match(metric: Tensor, merges: int, *, class_token: bool = False) -> tuple[Tensor, Tensor]:
    """Pair tokens at even places with their most similar tokens at odd places, and join the closest pairs.

    Args:
        metric: ``[n, d]`` what similarity is measured on.
        merges: how many even tokens are joined; at most half of the tokens (after the class token) can be.
        class_token: the first token takes no part, and what is not joined keeps its order.

    Returns:
        ``(places, source)``: int64 ``[m]`` input tokens that the outputs stand at, the even ones that are left (by
        descending similarity, or in their order with a class token) before the odd ones; and int64 ``[n]``, the
        output that each input token goes into.

    Example:
        >>> places, source = bipartite_match(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), 1)
        >>> places.tolist(), source.tolist()
        ([2, 1], [1, 1, 0])
    """
    unit = normalised(metric)
    total, device = unit.shape[0], unit.device
    merges = max(0, min(merges, (total - class_token) // 2))
    everything = torch.arange(total, device=device)
    if merges == 0:
        return everything, everything
    even, odd = everything[0::2], everything[1::2]
    blocks = [(unit[even[part]] @ unit[odd].T).max(dim=1) for part in row_blocks(even.numel(), odd.numel())]
    closeness, partner = torch.cat([found.values for found in blocks]), torch.cat([found.indices for found in blocks])
    if class_token:
        closeness[0] = -torch.inf
    order = closeness.sort(descending=True, stable=True).indices
    joined, left = order[:merges], order[merges:]
    if class_token:
        left = left.sort().values
    places, source = torch.cat([even[left], odd]), torch.empty_like(everything)
    source[even[left]] = torch.arange(left.numel(), device=device)
    source[odd] = torch.arange(left.numel(), places.numel(), device=device)
    source[even[joined]] = partner[joined] + left.numel()
    return places, source


def halvings(total: int, kept: int, *, protected: int = 0) -> Iterator[int]:
    """Say how many tokens each round joins when a round can join at most half of them.

    Args:
        total: number of tokens.
        kept: how many are to be left; at least 1 beside those protected.
        protected: number of tokens that take no part, counted in both.

    Example:
        >>> list(halvings(196, 49)), list(halvings(10, 9)), list(halvings(6, 2, protected=1))
        ([98, 49], [1], [2, 1, 1])
    """
    while total > kept:
        merges = min(total - kept, (total - protected) // 2)
        yield merges
        total -= merges


def highest_first(score: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` highest scores, highest first; ties go to the lower index.

    Args:
        score: ``[N]``.
        count: how many.

    Example:
        >>> highest_first(torch.tensor([0.1, 0.3, 0.2, 0.3]), 3).tolist()
        [1, 3, 2]
    """
    return score.float().sort(descending=True, stable=True).indices[:count]
