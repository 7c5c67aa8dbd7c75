"""Rotation in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate states ``[..., n, d]`` by ``[n, r]`` cosines and sines; channels beyond r stay.

    The two halves of the r channels are the two coordinates, as in Llama and Qwen.

    Example:
        >>> right = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> rotate(torch.tensor([[3.0, 4.0]]), *right).tolist()
        [[-4.0, 3.0]]
    """
    width = cos.shape[-1]
    turned, rest = states[..., :width], states[..., width:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def undo(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn rotated states ``[..., n, d]`` back, in float32.

    Example:
        >>> right = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> undo(torch.tensor([[-4.0, 3.0]]), *right).tolist()
        [[3.0, 4.0]]
    """
    # Some position embeddings also scale: what was multiplied has to be divided.
    factor = (cos**2 + sin**2).float()
    return rotate(states.float(), cos.float() / factor, -sin.float() / factor)


def rerotated(keys: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], places: Tensor | None) -> Tensor:
    """Undo the old rotation and apply the new; ``places`` is ``[B, G, n]``."""
    back = undo(keys, *(_spread(table) for table in old))
    if places is None:
        cos, sin = (_spread(table).float() for table in new)
    elif new[0].ndim == 2:
        cos, sin = (table.float()[places] for table in new)
    else:
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None, None]
        cos, sin = (table.float().expand(keys.shape[0], -1, -1)[rows, places] for table in new)
    return rotate(back, cos, sin).to(keys.dtype)


def _spread(table: Tensor) -> Tensor:
    """Align ``[B, n, r]`` with ``[B, G, n, d]``."""
    return table if table.ndim == 2 else table[:, None]
