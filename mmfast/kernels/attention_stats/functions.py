"""Slices of attention in Triton, known to autograd: forward once, and the way back without a stored matrix."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from mmfast.kernels.attention_stats import triton, triton_backward
from mmfast.kernels.attention_stats.problem import Problem
from mmfast.kernels.attention_stats.triton_backward import Pull

BLOCK_ELEMENTS = 1 << 26
"""Entries of which the winning head is held at once (128 MiB), on the way back from the largest of the heads."""


class Attention(Function):
    """Log-sum-exps, mass and output."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, mask: Tensor | None, value: Tensor | None, problem: Problem, *others: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Go over all rows once; ``others`` holds the visual columns."""
        (visual,) = others
        lse, mass, read = triton.rows(problem, value, visual)
        _save(ctx, problem, value, visual, lse, mass, read)
        ctx.set_materialize_grads(False)
        return lse, mass, read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *pulled: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key, mask and value."""
        problem, (value, visual, lse, mass, read) = _saved(ctx)
        on_lse, on_mass, on_read = pulled
        along = torch.zeros_like(lse) if on_lse is None else on_lse.float()
        if on_mass is not None:
            along = along - on_mass * mass
        if on_read is not None:
            along = along - (on_read.float() * read.float()).sum(dim=-1)
            on_read = on_read.to(value.dtype)
        pull = Pull("rows", entries=on_mass, visual=None if on_mass is None else visual)
        if on_read is not None:
            pull.value, pull.towards = value, on_read
        gradients = _gradients(ctx, problem, pull, lse, along)
        like = problem.query, problem.key, problem.mask, value
        return *(_cast(*pair) for pair in zip(like, gradients, strict=True)), None, None


class FewRows(Function):
    """Probabilities."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, mask: Tensor | None, lse: Tensor | None, problem: Problem, first: int
    ) -> Tensor:
        """Compute all rows."""
        ctx.first, ctx.alone = first, lse is None
        lse = triton.rows(problem)[0] if lse is None else lse.float()
        _save(ctx, problem, lse)
        return triton.probabilities(problem, lse, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *pulled: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key, mask and log-sum-exps."""
        problem, (lse,) = _saved(ctx)
        pull = Pull("few", first=ctx.first, entries=pulled[0])
        found = -triton_backward.totals(problem, pull, lse, every=True)
        along, on_lse = (found, None) if ctx.alone else (torch.zeros_like(found), found)
        gradients = _gradients(ctx, problem, pull, lse, along)[:3]
        like = problem.query, problem.key, problem.mask
        return *(_cast(*pair) for pair in zip(like, gradients, strict=True)), on_lse, None, None


class ColumnSums(Function):
    """Reduced rows."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        lse: Tensor | None,
        weights: Tensor,
        problem: Problem,
        heads: Literal["none", "mean", "max"],
        over: Literal["sum", "max"],
        first: int,
    ) -> Tensor:
        """Reduce."""
        ctx.reduction, ctx.alone = (heads, over, first), lse is None
        needed = any(ctx.needs_input_grad)
        if lse is None:
            # The gradient of a weight of zero is not zero.
            lse = triton.rows(problem, weights=None if ctx.needs_input_grad[4] else weights)[0]
        lse = lse.float()
        total, won = triton.column_sums(problem, lse, weights, heads, over, first, named=needed)
        _save(ctx, problem, lse, weights, won)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *pulled: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key, mask, log-sum-exps and weights."""
        problem, (lse, weights, won) = _saved(ctx)
        heads, _, first = ctx.reduction
        batch, count, rows, columns = problem.sizes
        # [B, H or 1, m - first]
        entries = pulled[0] if heads == "none" else pulled[0][:, None]
        entries = entries / count if heads == "mean" else entries
        won = won[:, None] if won is not None and heads != "none" else won
        step = rows if heads != "max" else max(1, BLOCK_ELEMENTS // max(1, batch * (columns - first)))
        parts = []
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            own = problem if step >= rows else problem.part(part)
            level, weighed = lse[:, :, part].contiguous(), weights[..., part]
            pull = Pull("sums", first, entries, weighed, None if won is None else won - start)
            if heads == "max":
                pull.heads_won = triton.winners(own, level, first)
            total = triton_backward.totals(own, pull, level, every=ctx.needs_input_grad[4])
            through = -total * (weighed if weighed.ndim == 3 else weighed[:, None])
            along = through if ctx.alone else torch.zeros_like(through)
            found = _gradients(ctx, own, pull, level, along)[:3]
            parts.append((*found, through, total if weighed.ndim == 3 else total.sum(dim=1)))
        query, key, mask, *others = (list(each) for each in zip(*parts, strict=True))
        shared = problem.mask is not None and problem.mask.shape[2] == 1
        return (
            _cast(problem.query, query[0] if query[0] is None else torch.cat(query, dim=2)),
            _cast(problem.key, _added(key)),
            _cast(problem.mask, _added(mask) if mask[0] is None or shared else torch.cat(mask, dim=2)),
            None if ctx.alone else torch.cat(others[0], dim=2),
            torch.cat(others[1], dim=-1).to(weights.dtype) if ctx.needs_input_grad[4] else None,
            *(None,) * 4,
        )


def apply(function: type[Function], *given: Any) -> Any:
    """Call a function in the way autograd hears of it."""
    return function.apply(*given)


def _save(ctx: Any, problem: Problem, *others: Tensor | None) -> None:
    """Keep tensors in the way that lets autograd free them, and see whether they were written to."""
    ctx.save_for_backward(*problem.tensors, *others)
    ctx.numbers = problem.numbers


def _saved(ctx: Any) -> tuple[Problem, tuple[Any, ...]]:
    """Return the problem and the others."""
    tensors, count = ctx.saved_tensors, len(Problem.__dataclass_fields__) - len(ctx.numbers)
    return Problem.holding(tensors[:count], ctx.numbers), tensors[count:]


def _gradients(ctx: Any, problem: Problem, pull: Pull, lse: Tensor, along: Tensor) -> list[Tensor | None]:
    """Return the gradients of query, key, mask and value in float32, as far as they are needed."""
    query, key, mask, value = ctx.needs_input_grad[:4]
    found: list[Tensor | None] = [None] * 4
    if query:
        found[0] = triton_backward.query_gradient(problem, pull, lse, along)
    if key or (value and pull.value is not None):
        found[1], values = triton_backward.key_gradient(problem, pull, lse, along)
        found[3] = None if pull.value is None else values
    if mask:
        found[2] = triton_backward.mask_gradient(problem, pull, lse, along)
    return found


def _cast(like: Tensor | None, found: Tensor | None) -> Tensor | None:
    return None if like is None or found is None else found.to(like.dtype)


def _added(parts: list[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return sum(found[1:], found[0]) if found else None
