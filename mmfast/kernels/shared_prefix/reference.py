"""Plain torch: the queries of all sequences are rows of one product with the prefix."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from mmfast.kernels.parts import combine, partial_attention


def attend_shared(
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    suffix: tuple[Tensor, Tensor],
    suffix_visible: Tensor,
    prefix_visible: Tensor | None,
    prefix_bias: Tensor | None,
    *,
    scaling: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend to prefix and suffix apart and put both together; arguments as of the operation."""
    batch, heads, tokens, _ = query.shape
    groups = prefix[0].shape[0]
    share = heads // groups
    folded = rearrange(query, "b (g r) q d -> g (b r q) d", g=groups)
    visible = prefix_visible
    if visible is not None and visible.ndim == 3:
        visible = visible[:, None].expand(-1, share, -1, -1).reshape(1, batch * share * tokens, -1)
    elif visible is not None:
        visible = visible[:, None]
    bias = None if prefix_bias is None else prefix_bias[:, None]
    output, weight = partial_attention(folded, *prefix, visible, bias=bias, scaling=scaling, softcap=softcap)
    before = (
        rearrange(output, "g (b r q) v -> b g (r q) v", b=batch, q=tokens),
        rearrange(weight, "g (b r q) -> b g (r q)", b=batch, q=tokens),
    )
    own = rearrange(query, "b (g r) q d -> b g (r q) d", g=groups)
    after = partial_attention(
        own, *suffix, suffix_visible.repeat(1, share, 1)[:, None], scaling=scaling, softcap=softcap
    )
    output, weight = combine([before, after])
    whole = rearrange(output, "b g (r q) v -> b (g r) q v", q=tokens).to(query.dtype)
    return whole, rearrange(weight, "b g (r q) -> b (g r) q", q=tokens)
