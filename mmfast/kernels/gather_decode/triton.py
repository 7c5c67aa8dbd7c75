"""Triton: entries are read where they lie."""

from __future__ import annotations

from torch import Tensor

from mmfast.kernels.split_attention import Source, attend


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
    """Attend to what is named or marked; arguments as of the reference."""
    kept = None if kept is None else kept.expand(-1, -1, query.shape[2], -1)
    source = Source(key, value, kept, bias, None, indices, counts, limits)
    return attend(query, [source], scaling=scaling, softcap=softcap)
