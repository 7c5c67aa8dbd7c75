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


class RowCounts:
    """How many rows of each entry of a padded batch are no padding, checked.

    Counts on a GPU are not waited for: there, what is out of range is cut, and only :meth:`numbers` checks.

    Args:
        features: ``[B, N, D]``.
        counts: int32 or int64 ``[B]``; None = all.
        name: what ``features`` is called where it does not fit.
        axes: letters of its axes, separated by spaces; the first two are ``B N``.

    Raises:
        ValueError: if the shapes do not fit, or a count is out of range.
        TypeError: if a dtype does not fit.

    Example:
        >>> counts = RowCounts(torch.zeros(2, 5, 3), torch.tensor([4, 0]))
        >>> counts.numbers(), counts.tensor().tolist(), RowCounts(torch.zeros(2, 5, 3), None).numbers()
        ([4, 0], [4, 0], [5, 5])
    """

    def __init__(self, features: Tensor, counts: Tensor | None, *, name: str = "features", axes: str = "B N D") -> None:
        check_shape(name, features, axes)
        if not features.is_floating_point():
            raise TypeError(f"{name} is {features.dtype}, must be a floating point tensor")
        self._name, self._device = name, features.device
        self._batch, self._total = features.shape[:2]
        self._given = counts
        if counts is not None:
            check_shape("counts", counts, "B", B=self._batch)
            check_whole("counts", counts)
            if counts.device.type == "cpu":
                self.numbers()

    def numbers(self) -> list[int]:
        """Return the counts as numbers, which waits for a GPU they may lie on."""
        if self._given is None:
            return [self._total] * self._batch
        found: list[int] = self._given.tolist()
        if not all(0 <= count <= self._total for count in found):
            raise ValueError(f"counts={found} must lie in 0..{self._total}, the rows that {self._name} has")
        return found

    def tensor(self) -> Tensor:
        """Return the counts as int32 ``[B]`` beside the features."""
        if self._given is None:
            return torch.full((self._batch,), self._total, dtype=torch.int32, device=self._device)
        return self._given.to(self._device, torch.int32).clamp(0, self._total)


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
    if features.device.type == "cpu":
        return features.new_zeros(groups, features.shape[1], dtype=torch.float32).index_add_(0, group, features.float())
    # A matrix product, because scattered additions come in any order on a GPU and two runs would differ.
    member = (torch.arange(groups, device=group.device)[:, None] == group).float()
    return member @ features.float()
