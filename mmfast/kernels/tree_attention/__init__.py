"""Attention of the nodes of a draft tree to a cache and to their ancestors."""

from __future__ import annotations

from torch import Tensor

from mmfast.kernels.checks import attention_refusal, check_bool, check_heads, check_shape, gradient_refusal
from mmfast.kernels.dispatch import chosen, refusal_of
from mmfast.kernels.tree_attention import reference

__all__ = ["tree_attention"]


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Tensor,
    *,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from drafted tokens to what is cached and to those on their path; no mask over both is made.

    Args:
        query: ``[B, H, q, d]``, the nodes of a tree.
        key: ``[B, G, P + q, d]``, the cache with the keys of the nodes behind it, G dividing H.
        value: ``[B, G, P + q, v]``.
        sees: bool ``[B, q, q]``, which nodes each node sees: its ancestors and itself.
        valid: bool ``[B, P]``, or ``[B, S, P]`` where heads differ, S dividing H: which cached entries all nodes see;
            None = all.
        bias: float ``[B, S, P]``, added to the logits of cached entries, S dividing H; None = nothing.
        scaling: factor of the logits, ``d ** -0.5`` when None.
        softcap: cap of the logits, for models that have one.

    Returns:
        ``[B, H, q, v]`` in the dtype of the query, and float32 ``[B, H, q]`` logarithm of the sum of the exponentials
        of the logits; zero and minus infinity for nodes that see nothing.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if a mask is not bool.

    Example:
        >>> import torch
        >>> keys, values = torch.zeros(1, 1, 3, 2), torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
        >>> siblings = torch.eye(2, dtype=torch.bool)[None]
        >>> tree_attention(torch.zeros(1, 1, 2, 2), keys, values, siblings)[0].flatten().tolist()
        [1.5, 2.0]
    """
    check_shape("query", query, "B H q d")
    batch, heads, tokens, width = query.shape
    check_shape("key", key, "B G n d", B=batch, d=width)
    groups, entries = key.shape[1:3]
    check_heads("key", groups, 1, heads)
    check_shape("value", value, "B G n v", B=batch, G=groups, n=entries)
    if entries < tokens:
        raise ValueError(
            f"key has {entries} entries, must have at least the {tokens} of the query: the nodes come last"
        )
    stored = entries - tokens
    check_bool("sees", sees)
    check_shape("sees", sees, "B q k", B=batch, q=tokens, k=tokens)
    if valid is not None:
        check_bool("valid", valid)
        valid = valid[:, None] if valid.ndim == 2 else valid
        check_shape("valid", valid, "B S P", B=batch, P=stored)
        check_heads("valid", valid.shape[1], 1, heads)
    if bias is not None:
        check_shape("bias", bias, "B S P", B=batch, P=stored)
        check_heads("bias", bias.shape[1], 1, heads)
    refusal = (
        refusal_of(query, key, value, sees, valid, bias)
        or attention_refusal(query, key, value)
        or gradient_refusal(query, key, value, bias)
    )
    if chosen("tree_attention", refusal) == "triton":
        from mmfast.kernels.tree_attention import triton

        return triton.attend_tree(query, key, value, sees, valid, bias, scaling=scaling, softcap=softcap)
    return reference.attend_tree(query, key, value, sees, valid, bias, scaling=scaling, softcap=softcap)
