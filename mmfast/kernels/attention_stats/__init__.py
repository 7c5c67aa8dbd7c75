"""Slices of attention that methods need, without the matrix: row sums, a few rows, column sums, mass of some columns.

All take queries ``[B, H, R, d]`` and keys ``[B, G, m, d]`` in float16, bfloat16 or float32, compute in float32, and
share the keywords of :class:`Options`. A row that sees nothing has a log-sum-exp of minus infinity and probabilities
of zero. Gradients flow to queries, keys, values, additive masks, weights and log-sum-exps; the Triton form computes
probabilities anew for them, and holds no matrix on the way back either.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Unpack, cast

import torch
from torch import Tensor

from mmfast.kernels.attention_stats import reference
from mmfast.kernels.attention_stats.problem import Options, Problem, problem_of
from mmfast.kernels.checks import check_bool, check_shape
from mmfast.kernels.dispatch import chosen, refusal_of

__all__ = ["AttendedRows", "Options", "attend", "column_sums", "few_rows", "row_lse", "visual_mass"]

NAME = "attention_stats"
_WIDEST = 256
"""Largest head size the kernels are written for."""


class AttendedRows(NamedTuple):
    """What one pass over the rows finds.

    Attributes:
        output: ``[B, H, R, e]`` in the dtype of the query.
        lse: float32 ``[B, H, R]``, the log-sum-exp of each row of logits.
        mass: float32 ``[B, H, R]``, what each row gives to the visual columns; None where they were not named.
    """

    output: Tensor
    lse: Tensor
    mass: Tensor | None


def attend(
    query: Tensor, key: Tensor, value: Tensor, visual: Tensor | None = None, **options: Unpack[Options]
) -> AttendedRows:
    """Attend, and say what the slices need: they cost no second pass over the logits then.

    Args:
        query: ``[B, H, R, d]``.
        key: ``[B, G, m, d]``; G divides H.
        value: ``[B, G, m, e]``, of the same dtype.
        visual: as of :func:`visual_mass`; None = the mass is not asked for.
        options: see :class:`Options`.

    Returns:
        Output, log-sum-exps and mass.

    Raises:
        ValueError: if shapes do not fit, or a number is out of range.
        TypeError: if a dtype does not fit.

    Example:
        >>> states = torch.zeros(1, 1, 2, 4)
        >>> values = torch.tensor([[[[2.0], [4.0]]]])
        >>> found = attend(states, states, values, torch.tensor([False, True]))
        >>> found.output.flatten().tolist(), found.lse.exp().tolist(), found.mass.tolist()
        ([2.0, 3.0], [[[1.0, 2.0]]], [[[0.0, 0.5]]])
    """
    problem = problem_of(query, key, options)
    batch, groups, columns = key.shape[:3]
    check_shape("value", value, "B G m e", B=batch, G=groups, m=columns)
    if value.dtype != key.dtype:
        raise TypeError(f"value ({value.dtype}) and key ({key.dtype}) must have one dtype; convert one of them")
    lse, mass, output = _attended(problem, value, None if visual is None else _visual(problem, visual))
    return AttendedRows(cast("Tensor", output), lse, mass)


def row_lse(query: Tensor, key: Tensor, **options: Unpack[Options]) -> Tensor:
    """Compute the log-sum-exp of each row of logits.

    Args:
        query: ``[B, H, R, d]``.
        key: ``[B, G, m, d]``; G divides H.
        options: see :class:`Options`.

    Returns:
        float32 ``[B, H, R]``.

    Raises:
        ValueError: if shapes do not fit, or a number is out of range.
        TypeError: if a dtype does not fit.

    Example:
        >>> states = torch.zeros(1, 1, 3, 4)
        >>> row_lse(states, states).exp().round(decimals=4).tolist()
        [[[1.0, 2.0, 3.0]]]
    """
    return _attended(problem_of(query, key, options), None, None)[0]


def few_rows(
    query: Tensor, key: Tensor, lse: Tensor | None = None, *, first: int = 0, **options: Unpack[Options]
) -> Tensor:
    """Compute the probabilities of a few rows.

    The result is as large as it says: for many rows use :func:`column_sums`.

    Args:
        query: ``[B, H, R, d]`` of the rows; say by ``places`` which columns they stand in.
        key: ``[B, G, m, d]``; G divides H.
        lse: float32 ``[B, H, R]`` from :func:`row_lse`; None = computed.
        first: columns before this one are seen but not returned.
        options: see :class:`Options`.

    Returns:
        float32 ``[B, H, R, m - first]``.

    Raises:
        ValueError: if shapes do not fit, or a number is out of range.
        TypeError: if a dtype does not fit.

    Example:
        >>> states = torch.zeros(1, 1, 3, 4)
        >>> few_rows(states[:, :, 1:2], states, places=torch.tensor([1])).tolist()
        [[[[0.5, 0.5, 0.0]]]]
    """
    problem = problem_of(query, key, options)
    _check(problem, lse, first)
    if _in_triton(problem, lse):
        from mmfast.kernels.attention_stats.functions import FewRows, apply

        found: Tensor = apply(FewRows, query, key, problem.mask, lse, problem, first)
        return found
    return reference.few_rows(problem, lse, first)


def column_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    heads: Literal["none", "mean", "max"] = "none",
    over: Literal["sum", "max"] = "sum",
    first: int = 0,
    **options: Unpack[Options],
) -> Tensor:
    """Reduce the rows to one number per column: ``c_j = sum_i w_i P_ij``.

    Heads are reduced entry by entry before the rows are, also where the two do not commute: ``heads="max"`` adds up
    the largest entry over the heads, ``heads="mean", over="max"`` takes the largest mean. Rows of weight zero are
    not computed.

    Args:
        query: ``[B, H, R, d]``.
        key: ``[B, G, m, d]``; G divides H.
        lse: float32 ``[B, H, R]`` from :func:`row_lse`, worth keeping where columns are summed more than once;
            None = computed.
        weights: ``[R]``, ``[B, R]`` or, for ``heads="none"``, ``[B, H, R]`` weight of each row; None = 1.
        heads: ``"none"`` returns each head.
        over: ``"sum"``, or ``"max"`` for the largest ``w_i P_ij`` and at least zero.
        first: columns before this one are seen but not returned.
        options: see :class:`Options`.

    Returns:
        float32 ``[B, m - first]``, or ``[B, H, m - first]`` for ``heads="none"``.

    Raises:
        ValueError: if shapes do not fit, or a number or name is out of range.
        TypeError: if a dtype does not fit.

    Example:
        >>> states = torch.zeros(1, 1, 2, 4)
        >>> column_sums(states, states, heads="mean").tolist()
        [[1.5, 0.5]]
    """
    problem = problem_of(query, key, options)
    batch, count, rows, _ = problem.sizes
    if heads not in ("none", "mean", "max"):
        raise ValueError(f"heads={heads!r} must be one of 'none', 'mean', 'max'")
    if over not in ("sum", "max"):
        raise ValueError(f"over={over!r} must be one of 'sum', 'max'")
    _check(problem, lse, first)
    if weights is None:
        weights = torch.ones(rows, device=query.device)
    shape = (batch, rows) if weights.ndim < 3 else (batch, count, rows)
    if weights.ndim == 3 and heads != "none":
        raise ValueError(f"weights {list(weights.shape)} of each head need heads='none', not {heads!r}")
    if tuple(weights.shape) not in {(rows,), shape}:
        raise ValueError(
            f"weights {list(weights.shape)} must be [{rows}], [{batch}, {rows}] or [{batch}, {count}, {rows}]"
        )
    weights = weights.expand(shape)
    # Weights that say yes or no are numbers here.
    weights = weights if weights.is_floating_point() else weights.float()
    if _in_triton(problem, lse, weights):
        from mmfast.kernels.attention_stats.functions import ColumnSums, apply

        found: Tensor = apply(ColumnSums, query, key, problem.mask, lse, weights, problem, heads, over, first)
        return found
    return reference.column_sums(problem, lse, weights, heads, over, first)


def visual_mass(query: Tensor, key: Tensor, visual: Tensor, **options: Unpack[Options]) -> Tensor:
    """Compute how much each row gives to some columns together: ``m_i = sum_{j in V} P_ij``.

    Args:
        query: ``[B, H, R, d]``.
        key: ``[B, G, m, d]``; G divides H.
        visual: ``[m]`` or ``[B, m]`` bool, the columns.
        options: see :class:`Options`.

    Returns:
        float32 ``[B, H, R]``.

    Raises:
        ValueError: if shapes do not fit, or a number is out of range.
        TypeError: if a dtype does not fit.

    Example:
        >>> states = torch.zeros(1, 1, 2, 4)
        >>> visual_mass(states, states, torch.tensor([False, True])).tolist()
        [[[0.0, 0.5]]]
    """
    problem = problem_of(query, key, options)
    return cast("Tensor", _attended(problem, None, _visual(problem, visual))[1])


def refusal(*tensors: Tensor | None, width: int) -> str:
    """Say why the Triton form cannot run on these tensors; empty where it can.

    Args:
        tensors: all of the arguments; None = not given.
        width: head size.

    Example:
        >>> refusal(width=512)
        'head size 512 is more than 256'
    """
    if width > _WIDEST:
        return f"head size {width} is more than {_WIDEST}"
    return refusal_of(*tensors)


def _attended(
    problem: Problem, value: Tensor | None, visual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Go over all rows once: log-sum-exp, mass and output."""
    if _in_triton(problem, value, visual, width=1 if value is None else int(value.shape[-1])):
        from mmfast.kernels.attention_stats.functions import Attention, apply

        found: tuple[Tensor, Tensor | None, Tensor | None] = apply(
            Attention, problem.query, problem.key, problem.mask, value, problem, visual
        )
        return found
    return reference.attend(problem, value, visual)


def _visual(problem: Problem, visual: Tensor) -> Tensor:
    """Check which columns are visual, and return them as ``[B, m]``."""
    batch, _, _, columns = problem.sizes
    check_bool("visual", visual, "visual")
    if tuple(visual.shape) not in {(columns,), (batch, columns)}:
        raise ValueError(f"visual {list(visual.shape)} must be [{columns}] or [{batch}, {columns}]")
    return visual.expand(batch, columns)


def _in_triton(problem: Problem, *others: Tensor | None, width: int = 1) -> bool:
    width = max(width, int(problem.query.shape[-1]))
    # Without rows or columns there is nothing to launch; the loops of the reference are empty then.
    return 0 not in problem.sizes and chosen(NAME, refusal(*problem.tensors, *others, width=width)) == "triton"


def _check(problem: Problem, lse: Tensor | None, first: int) -> None:
    batch, heads, rows, columns = problem.sizes
    if lse is not None:
        check_shape("lse", lse, "B H R", B=batch, H=heads, R=rows)
    if not 0 <= first <= columns:
        raise ValueError(f"first={first} must be in [0, {columns}], a column or one past the last")
