"""Small pieces of mathematics that several methods share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from mmfast.kernels import rows as kernel_rows
from mmfast.kernels.rows import MATRIX_LIMIT as MATRIX_LIMIT
from mmfast.kernels.rows import normalised as normalised
from mmfast.kernels.rows import sum_by_group as sum_by_group
from mmfast.tokens import Keep, Layout

_BLOCK_ELEMENTS = kernel_rows.BLOCK_ELEMENTS


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Cut ``rows`` rows of ``width`` entries into blocks of bounded size (64 MiB of float32).

    Example:
        >>> [part.stop - part.start for part in row_blocks(5, 1 << 23)]
        [2, 2, 1]
    """
    return kernel_rows.row_blocks(rows, width, _BLOCK_ELEMENTS)


class Cosines(kernel_rows.Cosines):
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
        super().__init__(features, MATRIX_LIMIT)

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


def frame_places(layout: Layout) -> list[Tensor]:
    """Group tokens by the frame they belong to, whatever tiles it is cut into; an image is one frame.

    Returns:
        int64 places of each group in ascending order, the groups in the order of their first token.

    Example:
        >>> [part.tolist() for part in frame_places(Layout.grid(1, 2, frames=2))]
        [[0, 1], [2, 3]]
    """
    groups = [(layout.frame == frame).nonzero().squeeze(-1) for frame in layout.frame.unique()]
    return sorted(groups, key=lambda part: int(part[0]))


def segment_sums(features: Tensor, group: Tensor, groups: int) -> Tensor:
    """As :func:`sum_by_group`, for many groups: the rows are sorted by group and added up one after the other.

    Example:
        >>> segment_sums(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 2]), 3).tolist()
        [[2.0], [0.0], [5.0]]
    """
    order = group.sort(stable=True).indices
    lengths = torch.bincount(group, minlength=groups)
    return torch.segment_reduce(features.float()[order], "sum", lengths=lengths, axis=0, initial=0)


def chain_heads(before: Tensor, after: Tensor, count: int, *, closure: bool = True) -> Tensor:
    """Give all that hangs together, directly or not, the lowest number among it.

    Args:
        before: int64 ``[L]``, one of each pair that hangs together.
        after: int64 ``[L]``, the other.
        count: number of things.
        closure: go on until nothing changes; False stops as the official code does, where each head is its own.

    Returns:
        int64 ``[count]``.

    Example:
        >>> chain_heads(torch.tensor([0, 1, 3]), torch.tensor([1, 2, 4]), 5).tolist()
        [0, 0, 0, 3, 3]
    """
    head = torch.arange(count, device=before.device)
    while True:
        lower = torch.minimum(head[before], head[after])
        changed = head.scatter_reduce(0, before, lower, "amin").scatter_reduce_(0, after, lower, "amin")
        if closure:
            # Heads are told too, or a chain would grow by one link in each round.
            changed = changed.scatter_reduce(0, head[before], lower, "amin").scatter_reduce_(
                0, head[after], lower, "amin"
            )
        changed = changed[changed]
        settled = torch.equal(changed, head) if closure else torch.equal(changed, changed[changed])
        head = changed
        if settled:
            return head
