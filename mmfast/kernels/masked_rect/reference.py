"""Plain torch: a block of query rows at a time, with the part of the mask that belongs to it."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from mmfast.kernels.parts import BLOCK_ELEMENTS, nothing


def attend_rectangles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rectangles: Tensor,
    places: Tensor,
    valid: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend; arguments as of the operation, with rectangles ``[B, M, 5]``."""
    batch, heads, rows, _ = query.shape
    groups, columns = key.shape[1:3]
    if not columns or not rows:
        output, weight = nothing(query, value.shape[3])
        return output.to(query.dtype), weight
    keys, values = key.float(), value.float()
    block = max(1, BLOCK_ELEMENTS // (batch * heads * columns))
    outputs, weights = [], []
    for start in range(0, rows, block):
        own = slice(start, start + block)
        visible = visible_of(rectangles, places, valid, columns, own)[:, None]
        blind = ~visible.any(dim=-1)
        part = rearrange(query[:, :, own].float(), "b (g r) q d -> b g (r q) d", g=groups)
        logits = rearrange(part @ keys.transpose(-1, -2) * scaling, "b g (r q) n -> b (g r) q n", r=heads // groups)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        # Rows that see nothing see everything for a moment: a softmax over nothing has no gradient.
        logits = logits.masked_fill(~visible, -torch.inf).masked_fill(blind[..., None], 0.0)
        shares = rearrange(logits.softmax(dim=-1), "b (g r) q n -> b g (r q) n", g=groups)
        output = rearrange(shares @ values, "b g (r q) v -> b (g r) q v", r=heads // groups)
        outputs.append(output.masked_fill(blind[..., None], 0.0))
        weights.append(logits.logsumexp(dim=-1).masked_fill(blind, -torch.inf))
    return torch.cat(outputs, dim=2).to(query.dtype), torch.cat(weights, dim=2)


def visible_of(rectangles: Tensor, places: Tensor, valid: Tensor | None, columns: int, own: slice) -> Tensor:
    """Write out some rows of the mask.

    Args:
        rectangles: ``[B, M, 5]``.
        places: ``[B, q]``.
        valid: ``[B, n]``.
        columns: n.
        own: which rows.

    Returns:
        bool ``[B, rows, n]``.

    Example:
        >>> rectangles = torch.tensor([[[0, 2, 0, 2, 1]]])
        >>> visible_of(rectangles, torch.tensor([[0, 1]]), None, 2, slice(0, 2)).int().tolist()
        [[[1, 0], [1, 1]]]
    """
    row = torch.arange(places.shape[1], device=places.device)[own, None]
    column = torch.arange(columns, device=places.device)
    below = column <= places[:, own, None]
    visible = torch.zeros_like(below)
    for one in rectangles.unbind(dim=1):
        first, behind, left, right, causal = (bound[:, None, None] for bound in one.unbind(dim=1))
        inside = (row >= first) & (row < behind) & (column >= left) & (column < right)
        visible = visible | (inside & (below | (causal == 0)))
    return visible if valid is None else visible & valid[:, None]
