"""Attention over a prefix that many sequences share: read once for the whole batch."""

from __future__ import annotations

from torch import Tensor

from mmfast.kernels.checks import attention_refusal, check_bool, check_heads, check_shape, gradient_refusal
from mmfast.kernels.dispatch import chosen, refusal_of
from mmfast.kernels.shared_prefix import reference

__all__ = ["shared_prefix"]


def shared_prefix(
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    suffix: tuple[Tensor, Tensor],
    suffix_visible: Tensor,
    *,
    prefix_visible: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to one prefix and to each sequence's own suffix.

    The queries of all sequences are rows of one attention over the prefix; attention over the suffixes is apart,
    and both are put together exactly.

    Paper: "Hydragen: High-Throughput LLM Inference with Shared Prefixes" (arXiv 2402.05099,
    ScalingIntelligence/hydragen).

    Args:
        query: ``[B, H, q, d]``.
        prefix: keys ``[G, P, d]`` and values ``[G, P, v]``, G dividing H.
        suffix: keys ``[B, G, s, d]`` and values ``[B, G, s, v]``.
        suffix_visible: bool ``[B, q, s]``.
        prefix_visible: bool ``[G, P]``, or ``[B, q, P]`` where queries differ; None = everything.
        prefix_bias: float ``[G, P]`` added to the logits; None = nothing.
        scaling: factor of the logits, ``d ** -0.5`` when None.
        softcap: cap of the logits, for models that have one.

    Returns:
        ``[B, H, q, v]`` in the dtype of the query, and float32 ``[B, H, q]`` logarithm of the sum of the exponentials
        of the logits; zero and minus infinity for rows that see nothing.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if a mask is not bool.

    Example:
        >>> import torch
        >>> before, after = torch.zeros(1, 3, 4), torch.ones(2, 1, 1, 4)
        >>> seen = torch.ones(2, 1, 1, dtype=torch.bool)
        >>> output, weight = shared_prefix(torch.zeros(2, 1, 1, 4), (before, before), (after, after), seen)
        >>> output[0, 0, 0, 0].item(), round(weight[0, 0, 0].exp().item(), 4)
        (0.25, 4.0)
    """
    check_shape("query", query, "B H q d")
    batch, heads, tokens, width = query.shape
    check_shape("the prefix's key", prefix[0], "G P d", d=width)
    groups, stored = prefix[0].shape[:2]
    check_heads("prefix", groups, 1, heads)
    check_shape("the prefix's value", prefix[1], "G P v", G=groups, P=stored)
    check_shape("the suffix's key", suffix[0], "B G s d", B=batch, G=groups, d=width)
    own = suffix[0].shape[2]
    check_shape("the suffix's value", suffix[1], "B G s v", B=batch, G=groups, s=own, v=prefix[1].shape[2])
    check_bool("suffix_visible", suffix_visible)
    check_shape("suffix_visible", suffix_visible, "B q s", B=batch, q=tokens, s=own)
    if prefix_visible is not None:
        check_bool("prefix_visible", prefix_visible)
        if prefix_visible.ndim == 3:
            check_shape("prefix_visible", prefix_visible, "B q P", B=batch, q=tokens, P=stored)
        else:
            check_shape("prefix_visible", prefix_visible, "G P", G=groups, P=stored)
    if prefix_bias is not None:
        check_shape("prefix_bias", prefix_bias, "G P", G=groups, P=stored)
    refusal = (
        refusal_of(query, *prefix, *suffix, suffix_visible, prefix_visible, prefix_bias)
        or attention_refusal(query, *prefix)
        or attention_refusal(query, *suffix)
        or gradient_refusal(query, *prefix, *suffix, prefix_bias)
    )
    options = {"scaling": scaling, "softcap": softcap}
    if chosen("shared_prefix", refusal) == "triton":
        from mmfast.kernels.shared_prefix import triton

        return triton.attend_shared(query, prefix, suffix, suffix_visible, prefix_visible, prefix_bias, **options)
    return reference.attend_shared(query, prefix, suffix, suffix_visible, prefix_visible, prefix_bias, **options)
