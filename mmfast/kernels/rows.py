"""Rows of features: how many of a padded batch count, their cosines, blocks of them, and sums over groups."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmfast.kernels.checks import check_shape, check_whole

MATRIX_LIMIT = 4096
"""Up to here one float32 ``N x N`` matrix of similarities is held; above, parts of it are computed when asked for."""
BLOCK_ELEMENTS = 1 << 24
"""Entries of a block held at once: 64 MiB of float32."""


def row_counts(features: Tensor, counts: Tensor | None, *, name: str = "features", axes: str = "B N D") -> list[int]:
    """Check a padded batch, and say how many of its rows count.

    Args:
        features: ``[B, N, D]``.
        counts: int32 or int64 ``[B]``, the rows of each entry that are no padding; None = all.
        name: what ``features`` is called where it does not fit.
        axes: letters of its axes, separated by spaces; the first two are ``B N``.

    Raises:
        ValueError: if the shapes do not fit, or a count is out of range.
        TypeError: if a dtype does not fit.

    Example:
        >>> row_counts(torch.zeros(2, 5, 3), None), row_counts(torch.zeros(2, 5, 3), torch.tensor([4, 0]))
        ([5, 5], [4, 0])
    """
    check_shape(name, features, axes)
    if not features.is_floating_point():
        raise TypeError(f"{name} is {features.dtype}, must be a floating point tensor")
    batch, total = features.shape[:2]
    if counts is None:
        return [total] * batch
    check_shape("counts", counts, "B", B=batch)
    check_whole("counts", counts)
    found: list[int] = counts.tolist()
    if not all(0 <= count <= total for count in found):
        raise ValueError(f"counts={found} must lie in 0..{total}, the rows that {name} has")
    return found


def check_count(name: str, value: int, least: int = 0) -> None:
    """Refuse what is no whole number, or too small a one.

    Raises:
        ValueError: naming argument, value and legal range.

    Example:
        >>> check_count("kept", 3)
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


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


def row_blocks(rows: int, width: int, elements: int | None = None) -> Iterator[slice]:
    """Cut ``rows`` rows of ``width`` entries into blocks of bounded size.

    Args:
        rows: how many there are.
        width: entries of each.
        elements: most entries of a block, unless a single row has more; :data:`BLOCK_ELEMENTS` when None.

    Example:
        >>> [part.stop - part.start for part in row_blocks(5, 1 << 23)]
        [2, 2, 1]
    """
    size = max(1, (BLOCK_ELEMENTS if elements is None else elements) // max(1, width))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class Cosines:
    """Cosine similarities of the rows of a tensor, in float32.

    Args:
        features: ``[N, D]``; rows of zeros have similarity 0 to everything.
        matrix_limit: up to how many rows all similarities are held.

    Example:
        >>> cosines = Cosines(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
        >>> cosines.between(torch.tensor([2])).tolist()
        [[0.6000000238418579, 0.800000011920929, 1.0]]
    """

    def __init__(self, features: Tensor, matrix_limit: int = MATRIX_LIMIT) -> None:
        self._unit = normalised(features)
        self._matrix = self._unit @ self._unit.T if len(self) <= matrix_limit else None

    def __len__(self) -> int:
        return int(self._unit.shape[0])

    def between(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return ``[R, C]`` similarities; ``columns=None`` means all N. A single row (0-d) gives ``[C]``."""
        if self._matrix is None:
            return self._unit[rows] @ (self._unit if columns is None else self._unit[columns]).T
        return self._matrix[rows] if columns is None else self._matrix[rows[..., None], columns]


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
    return membership(group, groups) @ features.float()


def membership(group: Tensor, groups: int) -> Tensor:
    """Return float32 ``[groups, R]``, 1 where a row is a member of a group; arguments as of :func:`sum_by_group`.

    Example:
        >>> membership(torch.tensor([1, 0]), 2).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    return (torch.arange(groups, device=group.device)[:, None] == group).float()
