"""Attention over a prefix that many sequences share: read once, combined exactly with what follows it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 24
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
        value: ``[..., n, d]``.
        visible: bool, broadcast to ``[..., R, n]``; None = everything.
        bias: float, broadcast to ``[..., R, n]`` and added to the logits; None = nothing.
        scaling: factor of the logits, ``d ** -0.5`` when None.
        softcap: cap of the logits, for models that have one.

    Returns:
        float32 ``[..., R, d]`` output and ``[..., R]`` logarithm of the sum of the exponentials of the logits; zero
        and minus infinity for rows that see nothing.

    Example:
        >>> ones = torch.ones(1, 2, 4)
        >>> output, weight = partial_attention(torch.zeros(1, 1, 4), ones, ones)
        >>> output[0, 0, 0].item(), round(weight[0, 0].exp().item(), 4)
        (1.0, 2.0)
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = query.numel() // query.shape[-1]
    block = max(1, _BLOCK_ELEMENTS // max(1, rows))
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
    if not parts:
        return torch.zeros_like(query, dtype=torch.float32), query.new_full(
            query.shape[:-1], -torch.inf, dtype=torch.float32
        )
    return combine(parts)


def combine(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Put attention over several parts together, as if it had been over all of them at once.

    Paper: "Hydragen: High-Throughput LLM Inference with Shared Prefixes" (arXiv 2402.05099,
    ScalingIntelligence/hydragen).

    Args:
        parts: outputs ``[..., d]`` and weights ``[...]`` as :func:`partial_attention` returns them.

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


def shared_prefix_attention(
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    suffix: tuple[Tensor, Tensor],
    suffix_visible: Tensor,
    *,
    prefix_visible: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend to one prefix and to each sequence's own suffix; the prefix is read once for the whole batch.

    Args:
        query: ``[B, H, q, d]``.
        prefix: keys and values ``[G, P, d]``.
        suffix: keys and values ``[B, G, s, d]``.
        suffix_visible: bool ``[B, q, s]``.
        prefix_visible: bool ``[G, P]``, or ``[B, q, P]`` where queries differ; None = everything.
        prefix_bias: float ``[G, P]`` added to the logits; None = nothing.
        scaling: factor of the logits.
        softcap: cap of the logits.

    Returns:
        ``[B, H, q, d]`` in the dtype of the query.

    Example:
        >>> query = torch.zeros(2, 1, 1, 4)
        >>> prefix, suffix = torch.zeros(1, 3, 4), torch.ones(2, 1, 1, 4)
        >>> seen = torch.ones(2, 1, 1, dtype=torch.bool)
        >>> shared_prefix_attention(query, (prefix, prefix), (suffix, suffix), seen)[0, 0, 0, 0].item()
        0.25
    """
    batch, heads, length, _ = query.shape
    groups = prefix[0].shape[0]
    folded = rearrange(query, "b (g r) q d -> g (b r q) d", g=groups)
    visible = prefix_visible
    if visible is not None and visible.ndim == 3:
        share = heads // groups
        visible = visible[:, None].expand(-1, share, -1, -1).reshape(1, batch * share * length, -1)
    elif visible is not None:
        visible = visible[:, None]
    bias = None if prefix_bias is None else prefix_bias[:, None]
    output, weight = partial_attention(folded, *prefix, visible, bias=bias, scaling=scaling, softcap=softcap)
    sizes = {"b": batch, "q": length}
    before = (
        rearrange(output, "g (b r q) d -> b g r q d", **sizes),
        rearrange(weight, "g (b r q) -> b g r q", **sizes),
    )
    own = rearrange(query, "b (g r) q d -> b g r q d", g=groups)
    keys, values = (states[:, :, None] for states in suffix)
    after = partial_attention(own, keys, values, suffix_visible[:, None, None], scaling=scaling, softcap=softcap)
    return rearrange(combine([before, after])[0], "b g r q d -> b (g r) q d").to(query.dtype)
