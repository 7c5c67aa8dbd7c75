"""Plain torch: chosen entries are gathered, a block of them at a time."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from mmfast.kernels.parts import BLOCK_ELEMENTS, combine, for_rows, nothing, partial_attention


def attend_gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    kept: Tensor | None,
    bias: Tensor | None,
    limits: Tensor | None,
    *,
    scaling: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend to what is named or marked; arguments as of the operation, but ``kept`` is ``[B, S, q or 1, P]``."""
    batch, heads, tokens, _ = query.shape
    groups, stored = key.shape[1:3]
    sources = groups if indices is None else indices.shape[1]
    rows = rearrange(query, "b (s r) q d -> b s (r q) d", s=sources)
    added = None if bias is None else for_rows(bias[:, :, None], heads, sources, tokens)
    last = None if limits is None else limits.repeat(1, heads // sources)[:, None, :, None]
    if indices is None:
        visible = None if kept is None else for_rows(kept, heads, sources, tokens)
        if last is not None:
            below = torch.arange(stored, device=key.device) <= last
            visible = below if visible is None else visible & below
        found = partial_attention(rows, key, value, visible, bias=added, scaling=scaling, softcap=softcap)
    else:
        ranks = torch.arange(indices.shape[2], device=key.device)
        real = (indices >= 0) & (indices < stored)
        if counts is not None:
            real = real & (ranks < counts[..., None])
        places = indices.long().masked_fill(~real, 0)
        row = torch.arange(batch, device=key.device)[:, None, None]
        group = (torch.arange(sources, device=key.device) // (sources // groups))[None, :, None]
        # Keys, values and logits of a block, in float32.
        block = max(1, BLOCK_ELEMENTS // max(1, batch * sources * (key.shape[3] + value.shape[3])))
        parts = [nothing(rows, value.shape[3])]
        for start in range(0, indices.shape[2] if stored else 0, block):
            own = slice(start, start + block)
            at = places[..., own]
            visible = real[:, :, None, own]
            if last is not None:
                visible = visible & (at[:, :, None] <= last)
            more = None
            if added is not None:
                more = added.gather(3, at[:, :, None].expand(-1, -1, added.shape[2], -1))
            keys, values = key[row, group, at], value[row, group, at]
            parts.append(partial_attention(rows, keys, values, visible, bias=more, scaling=scaling, softcap=softcap))
        found = combine(parts)
    output = rearrange(found[0], "b s (r q) v -> b (s r) q v", q=tokens)
    return output.to(query.dtype), rearrange(found[1], "b s (r q) -> b (s r) q", q=tokens)
