"""Attention masks of shortened sequences, in every form transformers uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmfast.kv.cache import LogicalLength


def pack(keep: Tensor) -> tuple[Tensor, Tensor | None]:
    """Turn a choice per row into indices of equal length, padded on the left.

    Args:
        keep: ``[B, S]`` bool.

    Returns:
        ``[B, K]`` int64 ascending indices and ``[B, K]`` bool saying which are real (None = all).
        Padding indices point at dropped tokens and must be hidden by every mask.

    Example:
        >>> indices, real = pack(torch.tensor([[True, False, True], [False, True, False]]))
        >>> indices.tolist(), real.tolist()
        ([[0, 2], [2, 1]], [[True, True], [False, True]])
    """
    counts = keep.sum(dim=1)
    longest = int(counts.max())
    if keep.shape[0] == 1:
        return keep[0].nonzero().T, None
    order = keep.to(torch.int8).sort(dim=1, stable=True).indices
    indices = order[:, keep.shape[1] - longest :]
    real = keep.gather(1, indices)
    return indices, None if bool(real.all()) else real


def gather_rows(values: Tensor, indices: Tensor) -> Tensor:
    """Gather ``[B or 1, S, ...]`` along the sequence with ``[B, K]`` indices.

    Example:
        >>> gather_rows(torch.arange(6.0).view(1, 3, 2), torch.tensor([[0, 2]])).tolist()
        [[[0.0, 1.0], [4.0, 5.0]]]
    """
    if values.shape[0] == 1 and indices.shape[0] == 1:
        return values.index_select(1, indices[0])
    values = values.expand(indices.shape[0], *values.shape[1:])
    view = indices.reshape(*indices.shape, *([1] * (values.ndim - 2)))
    return values.gather(1, view.expand(*indices.shape, *values.shape[2:]))


def gather_table(table: Tensor, indices: Tensor) -> Tensor:
    """Gather cosines or sines ``[B or 1, S, d]``, or ``[3, B or 1, S, d]``, along the sequence with ``[B, K]`` indices.

    Example:
        >>> gather_table(torch.arange(6.0).view(1, 3, 2), torch.tensor([[0, 2], [1, 1]]))[1].tolist()
        [[2.0, 3.0], [2.0, 3.0]]
    """
    # Tables are made once for all layers, which may be on several devices.
    indices = indices.to(table.device)
    if table.ndim == 3:
        return gather_rows(table, indices)
    wanted = indices[None, :, :, None].expand(table.shape[0], -1, -1, table.shape[-1])
    return table.expand(-1, indices.shape[0], -1, -1).gather(2, wanted)


def gather_positions(positions: Tensor, indices: Tensor) -> Tensor:
    """Gather position ids ``[B or 1, S]`` or ``[3 or 4, B, S]`` along their last axis.

    Example:
        >>> gather_positions(torch.arange(4)[None], torch.tensor([[1, 3]])).tolist()
        [[1, 3]]
    """
    wanted = indices.expand(*positions.shape[:-2], *indices.shape)
    return positions.expand(*positions.shape[:-2], *indices.shape[:1], -1).gather(-1, wanted)


def decoder_mask(
    layer: LogicalLength | None, batch: int, query: int, real: Tensor | None, device: torch.device
) -> Tensor:
    """Build the 2-D mask a decoder reads: stored tokens right-aligned on the logical axis.

    Args:
        layer: the cache layer after which the decoder sizes its masks, before this call; None without a cache.
        batch: rows.
        query: tokens of this call that the decoder sees.
        real: ``[B, query]`` bool, which of them are real; None = all.
        device: where to build it.

    Returns:
        bool ``[B, seen + query]``.
    """
    new = torch.ones(batch, query, dtype=torch.bool, device=device) if real is None else real
    if layer is None or layer.seen == 0:
        return new
    stored = layer.stored
    gone = torch.zeros(batch, layer.seen - stored, dtype=torch.bool, device=device)
    past = torch.ones(batch, stored, dtype=torch.bool, device=device) if layer.valid is None else layer.valid.to(device)
    return torch.cat([gone, past, new], dim=1)


def gather_prepared(mask: Any, indices: Tensor, real: Tensor | None) -> Any:
    """Shorten masks that were made before the decoder (4-D, or a mapping of them).

    Args:
        mask: ``[B or 1, 1, S, past + S]`` bool or additive, None, or a mapping of such.
        indices: ``[B, K]`` kept places of this call.
        real: ``[B, K]`` bool, which are real; None = all.
    """
    if isinstance(mask, Mapping):
        return {name: gather_prepared(value, indices, real) for name, value in mask.items()}
    if mask is None:
        if real is None:
            return None
        return causal(indices.shape[1], indices.device) & real[:, None, None, :]
    batch, kept = indices.shape
    length = mask.shape[2]
    past = mask.shape[3] - length
    mask = mask.expand(batch, *mask.shape[1:])
    rows = mask.gather(2, indices[:, None, :, None].expand(batch, mask.shape[1], kept, mask.shape[3]))
    new = rows[..., past:].gather(3, indices[:, None, None, :].expand(batch, mask.shape[1], kept, kept))
    if real is not None:
        new = hide(new, ~real[:, None, None, :])
    return torch.cat([rows[..., :past], new], dim=-1)


def causal(length: int, device: torch.device) -> Tensor:
    """Return the bool ``[1, 1, length, length]`` causal mask (True = visible)."""
    places = torch.arange(length, device=device)
    return (places[None, :] <= places[:, None])[None, None]


def hide(mask: Tensor, hidden: Tensor) -> Tensor:
    """Hide places in a bool (True = visible) or additive mask."""
    value = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(hidden, value)


def tree_mask(mask: Any, sees: Tensor, stored: int, dtype: torch.dtype, *, windowed: bool = False) -> Any:
    """Hide from drafted tokens those that are not on their path.

    Args:
        mask: what the decoder would read: None, 2-D, 4-D or a mapping of such.
        sees: ``[B, q, q]`` bool, which tokens of the call each one sees; a part of what causality lets it see.
        stored: entries of the layer after which the decoder sizes its masks, before this call.
        dtype: of the mask, where there was none for each pair.
        windowed: the mask is that of layers with a sliding window, which are given one of their own later.

    Returns:
        ``[B, 1, q, stored + q]``, of the kind there was or else additive, or a mapping of such.
    """
    if isinstance(mask, Mapping):
        return {
            name: tree_mask(value, sees, stored, dtype, windowed=name == "sliding_attention")
            for name, value in mask.items()
        }
    query = sees.shape[1]
    if mask is not None and mask.ndim == 4:
        own = mask[..., -query:].expand(sees.shape[0], -1, -1, -1)
        if windowed:
            # Windows made before the decoder count columns, of which a tree has more than places.
            own = torch.zeros_like(own) if own.is_floating_point() else torch.ones_like(own)
        return torch.cat([mask[..., :-query].expand(sees.shape[0], -1, -1, -1), hide(own, ~sees[:, None])], dim=-1)
    visible = torch.nn.functional.pad(sees, (stored, 0), value=True)
    if mask is not None:
        visible = visible & mask[:, None, -(stored + query) :].bool()
    return torch.zeros(visible.shape, dtype=dtype, device=sees.device).masked_fill(~visible, torch.finfo(dtype).min)[
        :, None
    ]


def layer_mask(
    mask: Tensor | None,
    *,
    entry: Tensor | None,
    real: Tensor | None,
    own: int,
    batch: int,
    query: int,
    device: torch.device,
    layer: LogicalLength | None,
    query_slots: Tensor | None,
    window: int | None,
) -> Tensor | None:
    """Build the mask of one layer whose stored tokens differ from what the decoder assumed.

    Args:
        mask: what the decoder made for all layers: None, 2-D or 4-D.
        entry: ``[B, query]`` places of this layer's tokens among the decoder's; None = the same.
        real: ``[B, query]`` bool, which of them are real; None = all.
        own: number of tokens of this call that the decoder saw.
        batch: rows of this layer's input.
        query: tokens of this layer's input.
        device: where the layer runs.
        layer: its cache layer, before the update; None without a cache.
        query_slots: ``[B, query]`` logical places of this layer's tokens, for windows.
        window: sliding window in logical places, or None.

    Returns:
        A mask of the same form over ``stored + query`` keys, or None where causality says it all.
    """
    stored = 0 if layer is None else layer.stored
    valid = None if layer is None else layer.valid
    if mask is not None and mask.ndim == 2:
        new2d = mask[:, -own:].bool()
        new2d = new2d if entry is None else new2d.gather(1, entry)
        new2d = new2d if real is None else new2d & real
        past2d = torch.ones(batch, stored, dtype=torch.bool, device=device) if valid is None else valid
        return torch.cat([past2d.to(device), new2d], dim=1)
    if mask is None:
        windowed = window is not None and layer is not None and layer.seen + query > window
        if real is None and valid is None and not windowed and (stored == 0 or query == 1):
            return None
        new = causal(query, device).expand(batch, -1, -1, -1)
    else:
        # The decoder's own tokens are the last columns of its mask.
        new = mask[..., -own:].expand(batch, -1, -1, -1)
        if entry is not None:
            new = new.gather(2, entry[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
            new = new.gather(3, entry[:, None, None, :].expand(-1, new.shape[1], new.shape[2], -1))
    if real is not None:
        new = hide(new, ~real[:, None, None, :])
    if window is not None and query_slots is not None:
        new = hide(new, query_slots[:, None, None, :] <= query_slots[:, None, :, None] - window)
    if stored == 0:
        return new
    visible = (torch.ones(batch, stored, dtype=torch.bool, device=device) if valid is None else valid.to(device))[
        :, None, None, :
    ].expand(-1, new.shape[1], query, -1)
    if window is not None and layer is not None and layer.slots is not None and query_slots is not None:
        near = layer.slots.to(device)[:, None, None, :] > query_slots[:, None, :, None] - window
        visible = visible & near
    if new.dtype != torch.bool:
        past = torch.zeros(visible.shape, dtype=new.dtype, device=device)
        return torch.cat([hide(past, ~visible), new], dim=-1)
    return torch.cat([visible, new], dim=-1)


def head_mask(mask: Tensor | None, layer: LogicalLength, *, query: int, query_heads: int, dtype: torch.dtype) -> Tensor:
    """Write out a mask per query head, for layers whose heads store different entries.

    Args:
        mask: 2-D or 4-D mask over ``stored + query`` keys that is the same for all heads; None where
            causality says it all.
        layer: the cache layer, before the update.
        query: tokens of this call.
        query_heads: number H of query heads.
        dtype: of the mask, where entries have weights of their own.

    Returns:
        ``[B, H, query, stored + query]``, bool or additive.
    """
    real = layer.real_entries()
    batch, heads, stored = real.shape
    if mask is None or mask.ndim == 2:
        own = causal(query, real.device)
        past = torch.ones(1, 1, query, stored, dtype=torch.bool, device=real.device)
        visible = torch.cat([past, own], dim=-1)
        mask = visible if mask is None else visible & mask[:, None, None, -(stored + query) :].bool()
    mask = mask.expand(batch, query_heads, -1, -1)
    gone = ~real.repeat_interleave(query_heads // heads, dim=1)
    gone = torch.cat([gone, gone.new_zeros(batch, query_heads, query)], dim=-1)
    if layer.bias is None:
        return hide(mask, gone[:, :, None])
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    weights = layer.bias.repeat_interleave(query_heads // heads, dim=1).to(mask.dtype)
    return hide(mask + torch.nn.functional.pad(weights, (0, query))[:, :, None], gone[:, :, None])
