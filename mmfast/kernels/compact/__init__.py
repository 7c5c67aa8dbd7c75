"""Gather the tokens that stay from everything that is kept per token, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.kernels.compact import reference
from mmfast.kernels.dispatch import chosen, refusal_of

__all__ = ["compact"]

NAME = "compact"
MOST = 8
"""Tensors of one launch; more are gathered in several."""


def compact(indices: Tensor, tensors: Sequence[Tensor], *, valid: Tensor | None = None) -> list[Tensor]:
    """Gather the same tokens from several tensors.

    Args:
        indices: ``[B, K]`` int64, which tokens stay; each in [0, S), for the smallest S. On a GPU that is not checked:
            it would have to be waited for.
        tensors: states ``[B, S, D]`` (hidden states, rotary tables), masks ``[B, S]`` or keys and values
            ``[B, G, S, d]``, of any dtype; S may differ between them, and B may be 1 where all rows are alike.
        valid: ``[B, K]`` bool, False where a row keeps fewer than K; zeros (False) are written there, and the index is
            not looked at. None = all.

    Returns:
        One tensor each, contiguous, with K in the place of S.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if a dtype does not fit.

    Example:
        >>> states, mask = torch.arange(6.0).reshape(1, 3, 2), torch.ones(1, 3, dtype=torch.bool)
        >>> kept = torch.tensor([[2, 0]])
        >>> [part.tolist() for part in compact(kept, [states, mask], valid=torch.tensor([[True, False]]))]
        [[[[4.0, 5.0], [0.0, 0.0]]], [[True, False]]]
    """
    if indices.ndim != 2:
        raise ValueError(f"indices {list(indices.shape)} must be [B, K]")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, not {indices.dtype}")
    batch, count = indices.shape
    if valid is not None:
        if valid.dtype != torch.bool:
            raise TypeError(f"valid must be bool, not {valid.dtype}")
        if valid.shape != indices.shape:
            raise ValueError(f"valid {list(valid.shape)} must be {[batch, count]}, as indices are")
    for place, tensor in enumerate(tensors):
        if tensor.ndim not in (2, 3, 4) or tensor.shape[0] not in (1, batch):
            raise ValueError(
                f"tensors[{place}] {list(tensor.shape)} must be [{batch}, S], [{batch}, S, D] or [{batch}, G, S, d]"
            )
        if tensor.shape[_axis(tensor)] == 0 and indices.numel():
            raise ValueError(f"tensors[{place}] {list(tensor.shape)} holds no tokens to gather")
    if indices.numel() and tensors and chosen(NAME, refusal(indices, valid, *tensors)) == "triton":
        from mmfast.kernels.compact import triton

        parts = [
            triton.compact(indices, tensors[start : start + MOST], valid) for start in range(0, len(tensors), MOST)
        ]
        return [tensor for part in parts for tensor in part]
    return [reference.gathered(tensor, indices, valid, _axis(tensor)) for tensor in tensors]


def refusal(*tensors: Tensor | None) -> str:
    """Say why the Triton form cannot run on these tensors; empty where it can.

    Example:
        >>> "backward" in refusal(torch.zeros(1, requires_grad=True))
        True
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return "its Triton form has no backward, and a gradient is needed"
    return refusal_of(*tensors)


def _axis(tensor: Tensor) -> int:
    """Axis of the tokens."""
    return 2 if tensor.ndim == 4 else 1
