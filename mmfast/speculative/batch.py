"""Rows that accept different numbers of tokens: what of a common cache is valid, and how to close the gaps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def after_paths(valid: Tensor, paths: Sequence[Sequence[int]], nodes: int) -> Tensor:
    """Return which entries are valid once every row has accepted a path; those rejected stay as holes.

    Args:
        valid: bool ``[B, P]``, which entries were valid before.
        paths: per row the accepted nodes, the root first; empty for a row that has ended.
        nodes: entries appended to every row, the roots' included.

    Returns:
        bool ``[B, P + nodes]``.

    Example:
        >>> after_paths(torch.tensor([[False, True], [True, True]]), [(0, 2), (0,)], 3).int().tolist()
        [[0, 1, 1, 0, 1], [1, 1, 1, 0, 0]]
    """
    added = torch.zeros(len(paths), nodes, dtype=torch.bool, device=valid.device)
    for row, path in enumerate(paths):
        added[row, list(path)] = True
    return torch.cat([valid.bool(), added], dim=-1)


def realigned(valid: Tensor) -> Tensor:
    """Return how to close the holes of a cache: the valid entries of every row, at its end.

    Args:
        valid: bool ``[B, W]``.

    Returns:
        int64 ``[B, w]``, entry to take for each place, -1 where a shorter row is padded; w is the largest
        number of valid entries.

    Example:
        >>> realigned(torch.tensor([[False, True, False, True], [True, True, True, False]])).tolist()
        [[-1, 1, 3], [0, 1, 2]]
    """
    counts = valid.sum(dim=-1)
    width = int(counts.max())
    # A stable sort puts holes first and keeps the order of the rest.
    order = valid.to(torch.int8).argsort(dim=-1, stable=True)[:, valid.shape[-1] - width :]
    places = torch.arange(width, device=valid.device)
    return torch.where(places >= (width - counts)[:, None], order, -1)
