"""Attention over parts of what there is, in plain torch, and their exact combination."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24
"""Largest number of float32 logits held at once (64 MiB)."""


def partial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to a part of what there is, and say how much weight the part has.

    Args:
        query: ``[..., R, d]``.
        key: ``[..., n, d]`` with the same leading axes.
        value: ``[..., n, v]``.
        visible: bool, broadcast to ``[..., R, n]``; None = everything.
        bias: float, broadcast to ``[..., R, n]`` and added to the logits; None = nothing.
        scaling: factor of the logits, ``d ** -0.5`` when None.
        softcap: cap of the logits, for models that have one.

    Returns:
        float32 ``[..., R, v]`` output and ``[..., R]`` logarithm of the sum of the exponentials of the logits; zero
        and minus infinity for rows that see nothing.

    Example:
        >>> ones = torch.ones(1, 2, 4)
        >>> output, weight = partial_attention(torch.zeros(1, 1, 4), ones, ones)
        >>> output[0, 0, 0].item(), round(weight[0, 0].exp().item(), 4)
        (1.0, 2.0)
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = query.numel() // query.shape[-1]
    block = max(1, BLOCK_ELEMENTS // max(1, rows))
    parts = []
    for start in range(0, key.shape[-2], block):
        own = slice(start, start + block)
        logits = torch.matmul(query.float(), key[..., own, :].float().transpose(-1, -2)) * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if bias is not None:
            logits = logits + bias[..., own].float()
        if visible is not None:
            logits = logits.masked_fill(~visible[..., own], -torch.inf)
        weight = logits.logsumexp(dim=-1)
        shares = (logits - weight.nan_to_num(neginf=0.0)[..., None]).exp()
        parts.append((torch.matmul(shares, value[..., own, :].float()), weight))
    return combine(parts) if parts else nothing(query, value.shape[-1])


def nothing(query: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return what attention over no entries is: zero, of weight minus infinity.

    Example:
        >>> nothing(torch.ones(1, 2), 3)
        (tensor([[0., 0., 0.]]), tensor([-inf]))
    """
    shape = query.shape[:-1]
    output = query.new_zeros(*shape, width, dtype=torch.float32)
    return output, query.new_full(shape, -torch.inf, dtype=torch.float32)


def combine(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Put attention over several parts together, as if it had been over all of them at once.

    Paper: "Hydragen: High-Throughput LLM Inference with Shared Prefixes" (arXiv 2402.05099,
    ScalingIntelligence/hydragen).

    Args:
        parts: outputs ``[..., v]`` and weights ``[...]`` as :func:`partial_attention` returns them.

    Returns:
        The same for the whole, float32.

    Example:
        >>> low, high = torch.tensor([0.0]), torch.tensor([4.0])
        >>> combine([(low, torch.tensor(0.0)), (high, torch.tensor(0.0))])[0].item()
        2.0
    """
    if len(parts) == 1:
        return parts[0][0].float(), parts[0][1].float()
    weights = torch.stack([weight.float() for _, weight in parts])
    whole = weights.logsumexp(dim=0)
    # Where nothing is seen at all every share is zero, not undefined.
    shares = (weights - whole.nan_to_num(neginf=0.0)).exp()
    output = sum(share[..., None] * output.float() for share, (output, _) in zip(shares, parts, strict=True))
    return torch.as_tensor(output), whole


def for_rows(values: Tensor, heads: int, sources: int, tokens: int) -> Tensor:
    """Lay a mask or bias out for query rows that are folded by the heads they read from.

    Args:
        values: ``[B, S, q or 1, n]``, S dividing ``heads``.
        heads: number H of query heads.
        sources: heads that are read from, dividing H.
        tokens: number q of query rows.

    Returns:
        ``[B, sources, 1 or H / sources * q, n]``.

    Example:
        >>> for_rows(torch.zeros(2, 8, 1, 5), 8, 4, 3).shape, for_rows(torch.zeros(2, 1, 1, 5), 8, 4, 3).shape
        (torch.Size([2, 4, 6, 5]), torch.Size([2, 4, 1, 5]))
    """
    if values.shape[2] == 1 and sources % values.shape[1] == 0:
        return values.repeat_interleave(sources // values.shape[1], dim=1)
    whole = values.repeat_interleave(heads // values.shape[1], dim=1).expand(-1, -1, tokens, -1)
    folded: Tensor = whole.unflatten(1, (sources, heads // sources))
    return folded.flatten(2, 3)
