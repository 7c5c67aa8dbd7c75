"""Turn cached keys from the positions they were rotated to, to others, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.kernels.dispatch import chosen, refusal_of
from mmfast.kernels.rerotate import reference

__all__ = ["rerotate"]

NAME = "rerotate"
Tables = tuple[Tensor, Tensor]


def rerotate(keys: Tensor, old: Tables, new: Tables, places: Tensor | None = None) -> Tensor:
    """Undo one rotary position embedding of keys and apply another, in float32.

    The two halves of the r rotated channels are the two coordinates, as in Llama and Qwen; channels beyond r stay.
    What an embedding scales by is divided out with the old tables and multiplied in with the new.

    Args:
        keys: ``[B, G, n, d]``, rotated by ``old``.
        old: cosines and sines, ``[n, r]`` or ``[B, n, r]``, of the keys as they are; r is even and at most d.
        new: cosines and sines of other positions, ``[m, r]`` or ``[B, m, r]``.
        places: ``[n]``, ``[B, n]`` or ``[B, G, n]`` int64, the row of ``new`` each key goes to, each in [0, m); on a
            GPU that is not checked. None = row by row, with m = n.

    Returns:
        ``[B, G, n, d]`` in the dtype of ``keys``.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if a dtype does not fit.

    Example:
        >>> angles = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
        >>> tables = angles.cos(), angles.sin()
        >>> keys = torch.tensor([[[[1.0, 0.0], [0.5403, 0.8415], [-0.4161, 0.9093]]]])
        >>> rerotate(keys, tables, tables, torch.tensor([0, 0, 0])).round(decimals=3).abs()[0, 0].tolist()
        [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    """
    if keys.ndim != 4 or not keys.is_floating_point():
        raise ValueError(f"keys {list(keys.shape)} ({keys.dtype}) must be floating [B, G, n, d]")
    batch, groups, count, width = keys.shape
    rotated = _check_tables("old", old, batch, count)
    if (
        rotated % 2
        or rotated > width
        or _check_tables("new", new, batch, None if places is not None else count) != rotated
    ):
        raise ValueError(
            f"old {list(old[0].shape)} and new {list(new[0].shape)} must rotate one even number of channels, "
            f"at most the {width} of keys"
        )
    if places is not None:
        if places.dtype != torch.int64:
            raise TypeError(f"places must be int64, not {places.dtype}")
        if tuple(places.shape) not in {(count,), (batch, count), (batch, groups, count)}:
            raise ValueError(
                f"places {list(places.shape)} must be {[count]}, {[batch, count]} or {[batch, groups, count]}"
            )
        places = places[:, None] if places.ndim == 2 else places
        places = places.expand(batch, groups, count)
    if keys.numel() and chosen(NAME, refusal(keys, *old, *new, places)) == "triton":
        from mmfast.kernels.rerotate import triton

        return triton.rerotate(keys, old, new, places)
    return reference.rerotated(keys, old, new, places)


def refusal(*tensors: Tensor | None) -> str:
    """Say why the Triton form cannot run on these tensors; empty where it can.

    Example:
        >>> "backward" in refusal(torch.zeros(1, requires_grad=True))
        True
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return "its Triton form has no backward, and a gradient is needed"
    return refusal_of(*tensors)


def _check_tables(name: str, tables: Tables, batch: int, count: int | None) -> int:
    """Return r."""
    cos, sin = tables
    if cos.shape != sin.shape or cos.ndim not in (2, 3) or (cos.ndim == 3 and cos.shape[0] not in (1, batch)):
        raise ValueError(f"{name} {list(cos.shape)}, {list(sin.shape)} must be two of [n, r] or [{batch}, n, r]")
    if count is not None and cos.shape[-2] != count:
        raise ValueError(f"{name} {list(cos.shape)} must have {count} rows, one for each key")
    return int(cos.shape[-1])
