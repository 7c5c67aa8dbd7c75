"""Attention over a prefix that many sequences share: read once, combined exactly with what follows it."""

from __future__ import annotations

from torch import Tensor

from mmfast.kernels.parts import combine, partial_attention
from mmfast.kernels.shared_prefix import shared_prefix

__all__ = ["combine", "partial_attention", "shared_prefix_attention"]


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
        >>> import torch
        >>> query = torch.zeros(2, 1, 1, 4)
        >>> prefix, suffix = torch.zeros(1, 3, 4), torch.ones(2, 1, 1, 4)
        >>> seen = torch.ones(2, 1, 1, dtype=torch.bool)
        >>> shared_prefix_attention(query, (prefix, prefix), (suffix, suffix), seen)[0, 0, 0, 0].item()
        0.25
    """
    masks = {"prefix_visible": prefix_visible, "prefix_bias": prefix_bias}
    return shared_prefix(query, prefix, suffix, suffix_visible, **masks, scaling=scaling, softcap=softcap)[0]
