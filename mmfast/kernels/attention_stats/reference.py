"""Slices of attention in plain torch, prompt by prompt and a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from mmfast.kernels.attention_stats.problem import HIDES, Problem

BLOCK_ELEMENTS = 1 << 22
"""Largest number of float32 logits held at once (16 MiB)."""


def exact(states: Tensor) -> torch.dtype:
    """Return what is computed in: float32, unless the states are finer.

    Example:
        >>> exact(torch.ones(1, dtype=torch.float16))
        torch.float32
    """
    return torch.promote_types(states.dtype, torch.float32)


def logits(query: Tensor, key: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """Multiply the queries and keys of one prompt.

    Args:
        query: ``[H, R, d]``.
        key: ``[G, m, d]``.
        scaling: factor of the products.
        softcap: cap of the logits.

    Returns:
        ``[H, R, m]`` in float32; in float64 where the states are.

    Example:
        >>> logits(torch.ones(2, 1, 4), torch.ones(1, 3, 4), 0.5).tolist()
        [[[2.0, 2.0, 2.0]], [[2.0, 2.0, 2.0]]]
    """
    grouped = rearrange(query, "(g r) n d -> g r n d", g=key.shape[0]).to(exact(query))
    found = torch.einsum("grnd,gkd->grnk", grouped, key.to(exact(key))) * scaling
    found = rearrange(found, "g r n k -> (g r) n k")
    return found if softcap is None else torch.tanh(found / softcap) * softcap


def masked(found: Tensor, mask: Tensor) -> Tensor:
    """Apply a mask, bool (True = visible) or additive, to logits; minus infinity where it hides.

    Example:
        >>> masked(torch.zeros(2), torch.tensor([0.5, torch.finfo(torch.float32).min])).tolist()
        [0.5, -inf]
    """
    if mask.dtype == torch.bool:
        return found.masked_fill(~mask, -torch.inf)
    return (found + mask.to(found.dtype)).masked_fill(mask <= HIDES, -torch.inf)


def reduced(
    block: Tensor, weights: Tensor, heads: Literal["none", "mean", "max"], over: Literal["sum", "max"]
) -> Tensor:
    """Reduce some rows of one prompt: over the heads first, then over the rows.

    Args:
        block: float32 ``[H, r, n]`` probabilities.
        weights: float32 ``[r]`` or ``[H, r]``.
        heads: how heads are reduced.
        over: how rows are reduced.

    Returns:
        float32 ``[n]``, or ``[H, n]`` for ``heads="none"``.

    Example:
        >>> reduced(torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]), torch.tensor([1.0, 2.0]), "max", "sum").tolist()
        [2.5, 0.5]
    """
    if heads != "none":
        # Not amax: of equal heads or rows the first takes the gradient, not all of them a share.
        block = block.max(dim=0).values if heads == "max" else block.mean(dim=0)
    if over == "max":
        return (block * weights[..., None]).max(dim=-2).values
    if heads == "none":
        return torch.einsum("hrn,hr->hn" if weights.ndim == 2 else "hrn,r->hn", block, weights)
    return weights @ block


def attend(
    problem: Problem, value: Tensor | None = None, visual: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Go over all rows once.

    Args:
        problem: what is seen, and how.
        value: ``[B, G, m, e]``; None where nothing is read.
        visual: ``[B, m]`` bool; None where nothing is counted.

    Returns:
        Log-sum-exps ``[B, H, R]``, the mass of the visual columns ``[B, H, R]`` and what is read ``[B, H, R, e]``.
    """
    batch, heads, rows, _ = problem.sizes
    dtype = exact(problem.query)
    lse = problem.query.new_empty((batch, heads, rows), dtype=dtype)
    mass = None if visual is None else torch.empty_like(lse)
    read = None if value is None else problem.query.new_empty((batch, heads, rows, value.shape[-1]))
    for sample in range(batch):
        for part, block in _logit_blocks(problem, sample):
            lse[sample][:, part] = _logsumexp(block)
            if value is None and visual is None:
                continue
            shares = softmax(block)
            if mass is not None and visual is not None:
                mass[sample][:, part] = (shares * visual[sample]).sum(dim=-1)
            if read is not None and value is not None:
                grouped = rearrange(shares, "(g r) n k -> g r n k", g=value.shape[1])
                own = torch.einsum("grnk,gkd->grnd", grouped, value[sample].to(dtype))
                read[sample][:, part] = own.flatten(0, 1).to(read.dtype)
    return lse, mass, read


def few_rows(problem: Problem, lse: Tensor | None, first: int) -> Tensor:
    """Return the probabilities of all rows, as one tensor."""
    found = [
        _probabilities(_masked(problem, sample, slice(None)), None if lse is None else lse[sample])[..., first:]
        for sample in range(problem.query.shape[0])
    ]
    return torch.stack(found)


def column_sums(
    problem: Problem,
    lse: Tensor | None,
    weights: Tensor,
    heads: Literal["none", "mean", "max"],
    over: Literal["sum", "max"],
    first: int,
) -> Tensor:
    """Reduce the rows; rows of weight zero are not computed."""
    batch, count, _, columns = problem.sizes
    shape = (batch, count, columns - first) if heads == "none" else (batch, columns - first)
    dtype = exact(problem.query)
    total = problem.query.new_zeros(shape, dtype=dtype)
    # The gradient of a weight does not need the weight.
    everyone = torch.is_grad_enabled() and weights.requires_grad
    for sample in range(batch):
        own = weights[sample].to(dtype)
        used = ((own != 0).any(dim=0) if own.ndim == 2 else own != 0) | everyone
        rows = used.nonzero().squeeze(-1)
        for part, block in _logit_blocks(problem, sample, rows):
            block = _probabilities(block, None if lse is None else lse[sample][:, part])[..., first:]
            found = reduced(block, own[..., part], heads, over)
            if over == "max":
                total[sample] = torch.where(found > total[sample], found, total[sample])
            else:
                total[sample] += found
    return total


def _logit_blocks(problem: Problem, sample: int, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the numbers of some rows, ``[r]`` int64, and their masked logits ``[H, r, m]``."""
    _, heads, count, columns = problem.sizes
    if rows is None:
        rows = torch.arange(count, device=problem.query.device)
    size = max(1, BLOCK_ELEMENTS // max(1, heads * columns))
    for start in range(0, rows.numel(), size):
        part = rows[start : start + size]
        yield part, _masked(problem, sample, part)


def _masked(problem: Problem, sample: int, rows: Tensor | slice) -> Tensor:
    """Return logits over the temperature, ``[H, r, m]``; minus infinity where a row sees nothing."""
    columns = problem.sizes[-1]
    found = logits(problem.query[sample][:, rows], problem.key[sample], problem.scaling, problem.softcap)
    if (mask := problem.whole_mask) is not None:
        found = masked(found, mask[sample][:, rows])
    if problem.valid is not None:
        found = found.masked_fill(~problem.valid[sample], -torch.inf)
    behind = torch.arange(columns, device=found.device)
    if problem.causal or problem.window is not None:
        places = problem.stood_in()[sample, rows, None]
        if problem.causal:
            found = found.masked_fill(behind > places, -torch.inf)
        if problem.window is not None:
            found = found.masked_fill(behind <= places - problem.window, -torch.inf)
    if problem.begins is not None and problem.ends is not None:
        begins, ends = problem.begins[sample, rows, None], problem.ends[sample, rows, None]
        found = found.masked_fill((behind < begins) | (behind >= ends), -torch.inf)
    return found / problem.temperature


def _probabilities(found: Tensor, lse: Tensor | None) -> Tensor:
    if lse is None:
        return softmax(found)
    # A row that sees nothing: exp(-inf - inf) is 0, where exp(-inf + inf) is not a number.
    return (found - torch.where(lse == -torch.inf, torch.inf, lse)[..., None]).exp()


def _logsumexp(found: Tensor) -> Tensor:
    """Take the log-sum-exp over the columns; minus infinity, and no gradient, for a row that sees nothing."""
    nothing = (found == -torch.inf).all(dim=-1)
    if not nothing.any():
        return found.logsumexp(dim=-1)
    return found.masked_fill(nothing[..., None], 0.0).logsumexp(dim=-1).masked_fill(nothing, -torch.inf)


def softmax(found: Tensor) -> Tensor:
    """Take the softmax over the columns; a row that sees nothing gives nothing.

    Example:
        >>> softmax(torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]])).tolist()
        [[0.5, 0.5], [0.0, 0.0]]
    """
    nothing = (found == -torch.inf).all(dim=-1, keepdim=True)
    if not nothing.any():
        return found.softmax(dim=-1)
    return found.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0)
