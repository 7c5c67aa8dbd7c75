"""Triton: the mask of the tree is read for its own columns alone."""

from __future__ import annotations

from torch import Tensor

from mmfast.kernels.split_attention import Source, attend


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
    """Attend to entries and nodes; arguments as of the reference."""
    kept = None if valid is None else valid[:, :, None].expand(-1, -1, query.shape[2], -1)
    return attend(query, [Source(key, value, kept, bias, sees)], scaling=scaling, softcap=softcap)
