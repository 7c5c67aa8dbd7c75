"""Plain torch: the cache and the tree apart, then together."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from mmfast.kernels.parts import combine, for_rows, partial_attention


def attend_tree(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Tensor,
    valid: Tensor | None,
    bias: Tensor | None,
    *,
    scaling: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend to entries and nodes; arguments as of the operation, but ``valid`` is ``[B, S, P]``."""
    heads, tokens = query.shape[1:3]
    groups, stored = key.shape[1], key.shape[2] - tokens
    rows = rearrange(query, "b (g r) q d -> b g (r q) d", g=groups)
    visible = None if valid is None else for_rows(valid[:, :, None], heads, groups, tokens)
    added = None if bias is None else for_rows(bias[:, :, None], heads, groups, tokens)
    states = key[:, :, :stored], value[:, :, :stored]
    past = partial_attention(rows, *states, visible, bias=added, scaling=scaling, softcap=softcap)
    own = sees.repeat(1, heads // groups, 1)[:, None]
    states = key[:, :, stored:], value[:, :, stored:]
    tree = partial_attention(rows, *states, own, scaling=scaling, softcap=softcap)
    output, weight = combine([past, tree])
    whole = rearrange(output, "b g (r q) v -> b (g r) q v", q=tokens).to(query.dtype)
    return whole, rearrange(weight, "b g (r q) -> b (g r) q", q=tokens)
