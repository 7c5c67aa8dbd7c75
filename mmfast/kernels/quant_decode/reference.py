"""Plain torch: codes are turned into numbers a block of entries at a time."""

from __future__ import annotations

from math import lcm

import torch
from einops import rearrange
from torch import Tensor

from mmfast.kernels.parts import BLOCK_ELEMENTS, combine, for_rows, nothing, partial_attention
from mmfast.kernels.words import Codes


def attend_codes(
    query: Tensor,
    key: Codes | None,
    value: Codes | None,
    loose_key: Tensor,
    loose_value: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    *,
    scaling: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend to codes and what follows; arguments as of the operation, but ``visible`` is ``[B, S, q or 1, n]``."""
    heads, tokens = query.shape[1:3]
    batch, groups, loose, width = loose_key.shape
    entries = loose + (0 if key is None else key.tokens)
    rows = rearrange(query, "b (g r) q d -> b g (r q) d", g=groups)
    shown = None if visible is None else for_rows(visible, heads, groups, tokens)
    added = None if bias is None else for_rows(bias[:, :, None], heads, groups, tokens)
    unit = lcm(*(codes.unit for codes in (key, value) if codes is not None))
    block = -(-max(1, BLOCK_ELEMENTS // (batch * groups * max(1, width))) // unit) * unit
    parts = [nothing(rows, loose_value.shape[3])]
    for start in range(0, entries, block):
        own = slice(start, min(start + block, entries))
        states = _states(key, loose_key, own), _states(value, loose_value, own)
        see = None if shown is None else shown[..., own]
        more = None if added is None else added[..., own]
        parts.append(partial_attention(rows, *states, see, bias=more, scaling=scaling, softcap=softcap))
    output, weight = combine(parts)
    whole = rearrange(output, "b g (r q) v -> b (g r) q v", q=tokens).to(query.dtype)
    return whole, rearrange(weight, "b g (r q) -> b (g r) q", q=tokens)


def _states(codes: Codes | None, loose: Tensor, own: slice) -> Tensor:
    """Return some entries as numbers, whichever way they are stored."""
    packed = 0 if codes is None else codes.tokens
    after = loose[:, :, max(0, own.start - packed) : max(0, own.stop - packed)]
    if codes is None or own.start >= packed:
        return after
    restored = codes.part(own.start, min(own.stop, packed)).restore().to(loose.dtype)
    return torch.cat([restored, after], dim=2) if after.shape[2] else restored
