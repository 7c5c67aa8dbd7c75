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


def logits(query: Tensor, key: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """Multiply the queries and keys of one prompt.

    Args:
        query: ``[H, R, d]``.
        key: ``[G, m, d]``.
        scaling: factor of the products.
        softcap: cap of the logits.

    Returns:
        float32 ``[H, R, m]``.

    Example:
        >>> logits(torch.ones(2, 1, 4), torch.ones(1, 3, 4), 0.5).tolist()
        [[[2.0, 2.0, 2.0]], [[2.0, 2.0, 2.0]]]
    """
    grouped = rearrange(query, "(g r) n d -> g r n d", g=key.shape[0]).float()
    found = torch.einsum("grnd,gkd->grnk", grouped, key.float()) * scaling
    found = rearrange(found, "g r n k -> (g r) n k")
    return found if softcap is None else torch.tanh(found / softcap) * softcap


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
        block = block.amax(dim=0) if heads == "max" else block.mean(dim=0)
    if over == "max":
        return (block * weights[..., None]).amax(dim=-2)
    if heads == "none":
        return torch.einsum("hrn,hr->hn" if weights.ndim == 2 else "hrn,r->hn", block, weights)
    return weights @ block


def row_lse(problem: Problem, value: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the log-sum-exp of all rows, and what they read from ``value``."""
    batch, heads, rows, _ = problem.sizes
    lse = problem.query.new_empty((batch, heads, rows), dtype=torch.float32)
    read = None if value is None else problem.query.new_empty((batch, heads, rows, value.shape[-1]))
    for sample in range(batch):
        for part, block in _logit_blocks(problem, sample):
            lse[sample][:, part] = block.logsumexp(dim=-1)
            if read is not None and value is not None:
                shares = rearrange(_softmax(block), "(g r) n k -> g r n k", g=value.shape[1])
                own = torch.einsum("grnk,gkd->grnd", shares, value[sample].float())
                read[sample][:, part] = own.flatten(0, 1).to(read.dtype)
    return lse, read


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
    total = problem.query.new_zeros(shape, dtype=torch.float32)
    for sample in range(batch):
        own = weights[sample].float()
        rows = (own != 0).any(dim=0).nonzero().squeeze(-1) if own.ndim == 2 else own.nonzero().squeeze(-1)
        for part, block in _logit_blocks(problem, sample, rows):
            block = _probabilities(block, None if lse is None else lse[sample][:, part])[..., first:]
            found = reduced(block, own[..., part], heads, over)
            if over == "max":
                total[sample] = torch.maximum(total[sample], found)
            else:
                total[sample] += found
    return total


def visual_mass(problem: Problem, visual: Tensor) -> Tensor:
    """Return what each row gives to the columns of ``visual``, ``[B, m]`` bool."""
    batch, heads, rows, _ = problem.sizes
    mass = problem.query.new_empty((batch, heads, rows), dtype=torch.float32)
    for sample in range(batch):
        for part, block in _logit_blocks(problem, sample):
            mass[sample][:, part] = (_softmax(block) * visual[sample]).sum(dim=-1)
    return mass


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
    _, _, count, columns = problem.sizes
    found = logits(problem.query[sample][:, rows], problem.key[sample], problem.scaling, problem.softcap)
    device = found.device
    if problem.mask is not None:
        own = problem.mask[sample][:, rows]
        if own.dtype == torch.bool:
            found = found.masked_fill(~own, -torch.inf)
        else:
            found = (found + own.float()).masked_fill(own <= HIDES, -torch.inf)
    if problem.valid is not None:
        found = found.masked_fill(~problem.valid[sample], -torch.inf)
    if problem.causal or problem.window is not None:
        places = torch.arange(columns - count, columns, device=device)
        places = (places if problem.places is None else problem.places[sample])[rows, None]
        behind = torch.arange(columns, device=device)
        if problem.causal:
            found = found.masked_fill(behind > places, -torch.inf)
        if problem.window is not None:
            found = found.masked_fill(behind <= places - problem.window, -torch.inf)
    return found / problem.temperature


def _probabilities(found: Tensor, lse: Tensor | None) -> Tensor:
    if lse is None:
        return _softmax(found)
    # A row that sees nothing: exp(-inf - inf) is 0, where exp(-inf + inf) is not a number.
    return (found - torch.where(lse == -torch.inf, torch.inf, lse)[..., None]).exp()


def _softmax(found: Tensor) -> Tensor:
    """Take the softmax over the columns; a row that sees nothing gives nothing."""
    nothing = (found == -torch.inf).all(dim=-1, keepdim=True)
    if not nothing.any():
        return found.softmax(dim=-1)
    return found.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0)
