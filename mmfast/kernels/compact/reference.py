"""Gathering in plain torch, tensor by tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def gathered(tensor: Tensor, indices: Tensor, valid: Tensor | None, axis: int) -> Tensor:
    """Gather ``[B, K]`` tokens along an axis of one tensor.

    Example:
        >>> gathered(torch.tensor([[5, 6, 7]]), torch.tensor([[2, 1]]), torch.tensor([[True, False]]), 1).tolist()
        [[7, 0]]
    """
    batch, count = indices.shape
    # [B, 1, ..., K, ..., 1]
    shape = [batch, *(1 for _ in tensor.shape[1:])]
    shape[axis] = count
    tensor = tensor.expand(batch, *tensor.shape[1:])
    wanted = [*tensor.shape]
    wanted[axis] = count
    places = indices if valid is None else indices.masked_fill(~valid, 0)
    found = tensor.gather(axis, places.reshape(shape).expand(wanted))
    return found if valid is None else torch.where(valid.reshape(shape), found, torch.zeros_like(found[..., :1]))
