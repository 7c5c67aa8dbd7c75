"""Attention in which rectangles of rows and columns see each other; nothing of the size of the mask is made."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mmfast.kernels.checks import attention_refusal, check_bool, check_heads, check_shape, check_whole
from mmfast.kernels.dispatch import chosen, refusal_of
from mmfast.kernels.masked_rect import reference

__all__ = ["masked_rect", "rectangles_of"]


def masked_rect(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rectangles: Tensor,
    *,
    places: Tensor | None = None,
    valid: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend where any of several rectangles says so.

    A rectangle lets a range of query rows see a range of columns: all of it, or as far as causality goes. The mask
    of a decoder is one causal rectangle. Gradients flow in both forms, through both results.

    Args:
        query: ``[B, H, q, d]``.
        key: ``[B, G, n, d]``, G dividing H.
        value: ``[B, G, n, v]``.
        rectangles: int ``[M, 5]``, or ``[B, M, 5]`` where the rows of the batch differ: first row, row behind the
            last, first column, column behind the last, and 1 where the rectangle is causal, else 0. Empty ones are
            allowed.
        places: int ``[B, q]``, the column at which each query row stands, of which it sees none behind in causal
            rectangles; None = the last q columns.
        valid: bool ``[B, n]``, False for columns that nobody sees, such as padding; None = all are real.
        scaling: factor of the logits, ``d ** -0.5`` when None.
        softcap: cap of the logits, for models that have one.

    Returns:
        ``[B, H, q, v]`` in the dtype of the query, and float32 ``[B, H, q]`` logarithm of the sum of the exponentials
        of the logits; zero and minus infinity for rows that see nothing.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if ``valid`` is not bool, or rectangles and places are no integers.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1)
        >>> rectangles = torch.tensor([[0, 3, 0, 3, 1], [0, 1, 2, 3, 0]])
        >>> masked_rect(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), values, rectangles)[0].flatten().tolist()
        [3.5, 1.5, 3.0]
    """
    check_shape("query", query, "B H q d")
    batch, heads, rows, width = query.shape
    check_shape("key", key, "B G n d", B=batch, d=width)
    groups, columns = key.shape[1:3]
    check_heads("key", groups, 1, heads)
    check_shape("value", value, "B G n v", B=batch, G=groups, n=columns)
    check_whole("rectangles", rectangles)
    if rectangles.ndim == 2:
        rectangles = rectangles.expand(batch, -1, -1)
    check_shape("rectangles", rectangles, "B M r", B=batch, r=5)
    if places is None:
        if columns < rows:
            raise ValueError(f"key has {columns} columns for {rows} rows: say with places where the rows stand")
        places = torch.arange(columns - rows, columns, device=query.device).expand(batch, -1)
    check_shape("places", places, "B q", B=batch, q=rows)
    check_whole("places", places)
    if valid is not None:
        check_bool("valid", valid)
        check_shape("valid", valid, "B n", B=batch, n=columns)
    refusal = refusal_of(query, key, value, rectangles, places, valid) or attention_refusal(query, key, value)
    scaling = width**-0.5 if scaling is None else scaling
    if chosen("masked_rect", refusal) == "triton":
        from mmfast.kernels.masked_rect import triton

        return triton.attend_rectangles(query, key, value, rectangles, places, valid, scaling, softcap)
    return reference.attend_rectangles(query, key, value, rectangles, places, valid, scaling, softcap)


def rectangles_of(
    pairs: Sequence[tuple[Tensor, Tensor]], causal: Sequence[tuple[int, int, int, int]] = (), *, device: torch.device
) -> Tensor:
    """Write who sees whom as rectangles.

    Args:
        pairs: ascending int64 rows ``[r]`` and columns ``[c]`` that see each other, whatever their order in time; each
            is cut into runs of neighbours.
        causal: first row, row behind the last, first column, column behind the last, of causal rectangles.
        device: of the result.

    Returns:
        int32 ``[M, 5]``, see :func:`masked_rect`.

    Example:
        >>> pairs = [(torch.tensor([0, 1]), torch.tensor([3, 4, 6]))]
        >>> rectangles_of(pairs, [(0, 7, 0, 7)], device=torch.device("cpu")).tolist()
        [[0, 7, 0, 7, 1], [0, 2, 3, 5, 0], [0, 2, 6, 7, 0]]
    """
    found = [[*one, 1] for one in causal]
    for rows, columns in pairs:
        found += [[*own, *other, 0] for own in _runs(rows) for other in _runs(columns)]
    return torch.tensor(found, dtype=torch.int32, device=device).view(-1, 5)


def _runs(places: Tensor) -> list[tuple[int, int]]:
    """Return where runs of neighbours begin and end."""
    if not places.numel():
        return []
    breaks = (places[1:] != places[:-1] + 1).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), places.numel()]
    values = places.tolist()
    return [(values[start], values[stop - 1] + 1) for start, stop in pairwise(bounds)]
