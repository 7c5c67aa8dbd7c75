"""Let tokens look at others that causality hides from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.call import Inner
from mmfast.token_pruning.layers import LayerMask


def with_pairs(mask: Any, method: LayerMask, inner: Inner, embeds: Tensor, reference: Any) -> Any:
    """Add the pairs that a method makes visible to the mask of a prompt.

    Args:
        mask: what the decoder would get: None, ``[B, KV]``, 4-D, or a mapping of such by kind of layer.
        method: the method.
        inner: the call, with its first level.
        embeds: ``[B, S, D]`` for device and dtype.
        reference: the cache layer that sizes the masks, before this call; None without a cache.

    Returns:
        An additive mask ``[B, 1, K, past + K]``, or a mapping of such.
    """
    if isinstance(mask, Mapping):
        return {kind: with_pairs(value, method, inner, embeds, reference) for kind, value in mask.items()}
    level = inner.levels[0]
    batch, length = level.slots.shape
    device = embeds.device
    past = 0 if reference is None else reference.stored
    if isinstance(mask, Tensor) and mask.ndim == 4:
        visible = mask if mask.dtype == torch.bool else mask == 0
        visible = visible.expand(batch, 1, -1, -1).clone()
    else:
        places = torch.arange(past + length, device=device)
        causal = places[None, :] <= places[past:, None]
        visible = causal.expand(batch, 1, -1, -1).clone()
        if isinstance(mask, Tensor):
            stored = mask[:, -(past + length) :].bool()
            visible &= stored[:, None, None, :]
    slots = level.slots.cpu()
    for row, parts in enumerate(inner.segments):
        real = torch.ones(length, dtype=torch.bool) if level.real is None else level.real[row].cpu()
        place_of = torch.full((inner.length,), -1, dtype=torch.int64)
        place_of[slots[row, real]] = real.nonzero().squeeze(-1)
        media = [part.slots.cpu() for part in parts]
        text = slots[row, real]
        text = text[~torch.isin(text, torch.cat(media))] if media else text
        for rows, columns in method.visible(media, text):
            own_rows, own_columns = (places[places >= 0] for places in (place_of[rows], place_of[columns]))
            visible[row, 0, own_rows[:, None].to(device), past + own_columns[None, :].to(device)] = True
    return torch.zeros(visible.shape, dtype=embeds.dtype, device=device).masked_fill(
        ~visible, torch.finfo(embeds.dtype).min
    )
