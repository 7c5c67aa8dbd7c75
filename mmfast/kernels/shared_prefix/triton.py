"""Triton: each part of the prefix is read by one program for the rows of the whole batch."""

from __future__ import annotations

from torch import Tensor

from mmfast.kernels.split_attention import Source, attend


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
    batch, _, tokens, _ = query.shape
    kept = prefix_visible
    if kept is not None:
        kept = kept[:, None] if kept.ndim == 3 else kept[None, :, None].expand(batch, -1, tokens, -1)
    bias = None if prefix_bias is None else prefix_bias[None].expand(batch, -1, -1)
    sources = [
        Source(prefix[0][None], prefix[1][None], kept, bias),
        Source(*suffix, suffix_visible[:, None]),
    ]
    return attend(query, sources, scaling=scaling, softcap=softcap)
