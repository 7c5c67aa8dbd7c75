"""Decode steps that read only chosen entries of a cache."""

from __future__ import annotations

from torch import Tensor

from mmfast.kernels.checks import attention_refusal, check_bool, check_heads, check_shape, check_whole, gradient_refusal
from mmfast.kernels.dispatch import chosen, refusal_of
from mmfast.kernels.gather_decode import reference

__all__ = ["gather_decode"]


def gather_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    kept: Tensor | None = None,
    bias: Tensor | None = None,
    limits: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from a few query rows to chosen entries, without gathering them.

    The entries are named by ``indices`` or marked by ``kept``. With indices the work is that of the chosen entries;
    a mask is read whole, but keys and values still only where it is True for some query row.

    Args:
        query: ``[B, H, q, d]``; meant for q up to 8.
        key: ``[B, G, P, d]``, G dividing H: query head h reads head ``h // (H / G)``.
        value: ``[B, G, P, v]``.
        indices: int ``[B, S, K]``, S a multiple of G that divides H: the entries that each of S groups of query heads
            reads. None twice; what is outside ``[0, P)`` stands for nothing.
        counts: int ``[B, S]``, how many of the indices are real, from the first on; None = all.
        kept: bool ``[B, S, P]``, or ``[B, S, q, P]`` where query rows differ; S divides H.
        bias: float ``[B, S, P]``, added to the logits of each stored entry; S divides H. None = nothing.
        limits: int ``[B, q]``, the last entry that each query row may see; None = the last one.
        scaling: factor of the logits, ``d ** -0.5`` when None.
        softcap: cap of the logits, for models that have one.

    Returns:
        ``[B, H, q, v]`` in the dtype of the query, and float32 ``[B, H, q]`` logarithm of the sum of the exponentials
        of the logits, with which the result can be combined with attention to other entries. Rows that see nothing
        give zero and minus infinity.

    Raises:
        ValueError: if shapes do not fit, or neither or both of ``indices`` and ``kept`` are given.
        TypeError: if a mask is not bool, or indices are no integers.

    Example:
        >>> import torch
        >>> key, value = torch.zeros(1, 1, 4, 2), torch.arange(4.0).view(1, 1, 4, 1)
        >>> output, weight = gather_decode(torch.zeros(1, 2, 1, 2), key, value, indices=torch.tensor([[[0, 3]]]))
        >>> output.flatten().tolist(), weight.exp().flatten().tolist()
        ([1.5, 1.5], [2.0, 2.0])
    """
    check_shape("query", query, "B H q d")
    batch, heads, tokens, width = query.shape
    check_shape("key", key, "B G P d", B=batch, d=width)
    groups, stored = key.shape[1:3]
    check_shape("value", value, "B G P v", B=batch, G=groups, P=stored)
    check_heads("key", groups, 1, heads)
    if (indices is None) == (kept is None):
        raise ValueError("give either indices or kept: the entries to read are named or marked")
    if indices is not None:
        check_shape("indices", indices, "B S K", B=batch)
        check_whole("indices", indices)
        check_heads("indices", indices.shape[1], groups, heads)
    if counts is not None:
        if indices is None:
            raise ValueError("counts say how many indices are real: leave them out with kept")
        check_shape("counts", counts, "B S", B=batch, S=indices.shape[1])
        check_whole("counts", counts)
    if kept is not None:
        check_bool("kept", kept)
        kept = kept[:, :, None] if kept.ndim == 3 else kept
        check_shape(
            "kept", kept, "B S q P", B=batch, P=stored, q=1 if kept.ndim == 4 and kept.shape[2] == 1 else tokens
        )
        check_heads("kept", kept.shape[1], 1, heads)
    if bias is not None:
        check_shape("bias", bias, "B S P", B=batch, P=stored)
        check_heads("bias", bias.shape[1], 1, heads)
    if limits is not None:
        check_shape("limits", limits, "B q", B=batch, q=tokens)
        check_whole("limits", limits)
    refusal = (
        refusal_of(query, key, value, indices, counts, kept, bias, limits)
        or attention_refusal(query, key, value)
        or gradient_refusal(query, key, value, bias)
    )
    options = {"scaling": scaling, "softcap": softcap}
    if chosen("gather_decode", refusal) == "triton":
        from mmfast.kernels.gather_decode import triton

        return triton.attend_gathered(query, key, value, indices, counts, kept, bias, limits, **options)
    return reference.attend_gathered(query, key, value, indices, counts, kept, bias, limits, **options)
