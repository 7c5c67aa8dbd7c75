"""Rewrite the mask of a whole call: further pairs that may look at each other, and weights of merged tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.base import Adapter
from mmfast.adapters.cache import reference_layer
from mmfast.adapters.call import Inner
from mmfast.adapters.compression import hide_compressed, hide_pairs
from mmfast.adapters.kernel_attention import arm_pairs
from mmfast.token_pruning.compression_base import Compressor
from mmfast.token_pruning.layers import LayerMask


def with_rules(
    adapter: Adapter,
    inner: Inner,
    mask: Any,
    embeds: Tensor,
    pairs: LayerMask | None,
    *,
    calibrates: bool,
    alone: bool,
) -> Any:
    """Let a kernel attend by what a method makes visible, where one can; else write that into the mask.

    Args:
        adapter: the adapter of the model.
        inner: the call, with its first level.
        mask: what the decoder would get.
        embeds: ``[B, S, D]`` for device and dtype.
        pairs: a method that makes further pairs of tokens visible.
        calibrates: attention to merged tokens is weighed.
        alone: nothing else acts inside the language model.

    Returns:
        The mask for the decoder, see :func:`rewritten`.
    """
    if isinstance(pairs, Compressor):
        if not hide_compressed(adapter, inner, pairs, embeds) and not calibrates:
            return mask
    elif pairs is not None and alone and not calibrates and arm_pairs(adapter, inner, embeds, partial(pairs_of, pairs)):
        return mask
    return rewritten(
        mask,
        inner,
        embeds,
        None if inner.cache is None else reference_layer(inner.cache),
        pairs=pairs,
        frequencies=adapter.rotary_frequencies() if calibrates else None,
        window=getattr(adapter.text_config, "sliding_window", None),
    )


def rewritten(
    mask: Any,
    inner: Inner,
    embeds: Tensor,
    reference: Any,
    *,
    pairs: LayerMask | None = None,
    frequencies: Tensor | None = None,
    window: int | None = None,
) -> Any:
    """Write a mask out and change it.

    Args:
        mask: what the decoder would get: None, ``[B, KV]``, 4-D, or a mapping of such by kind of layer.
        inner: the call, with its first level.
        embeds: ``[B, S, D]`` for device and dtype.
        reference: the cache layer that sizes the masks, before this call; None without a cache.
        pairs: a method that makes further pairs of tokens visible.
        frequencies: ``[d/2]`` rotary frequencies, to calibrate attention to merged tokens; None = do not.
        window: the sliding window of layers that have one; further pairs do not reach beyond it.

    Returns:
        An additive mask ``[B, 1, K, past + K]``, or a mapping of such.
    """
    if isinstance(mask, Mapping):
        return {
            kind: rewritten(
                value,
                inner,
                embeds,
                reference,
                pairs=pairs,
                frequencies=frequencies,
                window=window if kind == "sliding_attention" else None,
            )
            for kind, value in mask.items()
        }
    level = inner.levels[0]
    batch, length = level.slots.shape
    device = embeds.device
    stored = 0 if reference is None else reference.stored
    visible = _visible(mask, batch, length, stored, device)
    # The decoder sizes masks by the logical length; what is stored stands at the right.
    visible = visible[..., -(stored + length) :]
    if isinstance(pairs, Compressor):
        hide_pairs(visible, inner)
    elif pairs is not None:
        _add_pairs(visible, pairs, inner, window)
    bias = torch.zeros(visible.shape, dtype=torch.float32, device=device)
    if frequencies is not None:
        bias += _calibration(inner, reference, frequencies, device)
    return bias.to(embeds.dtype).masked_fill(~visible, torch.finfo(embeds.dtype).min)


def _visible(mask: Tensor | None, batch: int, length: int, stored: int, device: torch.device) -> Tensor:
    """Write out who sees whom, bool ``[B, 1, K, KV]``."""
    if mask is not None and mask.ndim == 4:
        seen = mask if mask.dtype == torch.bool else mask == 0
        return seen.expand(batch, 1, -1, -1).clone()
    places = torch.arange(stored + length, device=device)
    visible = (places <= places[stored:, None]).expand(batch, 1, -1, -1).clone()
    if mask is not None:
        visible &= mask[:, -(stored + length) :].bool()[:, None, None, :]
    return visible


def _add_pairs(visible: Tensor, method: LayerMask, inner: Inner, window: int | None) -> None:
    level = inner.levels[0]
    device = visible.device
    # The tokens of this call are the last columns, however many a layer stores.
    stored = visible.shape[-1] - level.length
    slots = level.slots.cpu()
    for row, pairs in enumerate(pairs_of(method, inner)):
        for own_rows, own_columns in pairs:
            allowed = torch.ones(own_rows.numel(), own_columns.numel(), dtype=torch.bool)
            if window is not None:
                allowed = slots[row, own_columns][None, :] > slots[row, own_rows][:, None] - window
            seen = visible[row, 0]
            places = own_rows[:, None].to(device), stored + own_columns[None, :].to(device)
            seen[places] = seen[places] | allowed.to(device)


def pairs_of(method: LayerMask, inner: Inner) -> list[list[tuple[Tensor, Tensor]]]:
    """Ask a method, prompt by prompt, which tokens see each other besides what causality allows.

    Args:
        method: the method.
        inner: the call, with its first level.

    Returns:
        Per row of the batch, int64 rows and columns among the tokens of the level, ascending.
    """
    level = inner.levels[0]
    slots, found = level.slots.cpu(), []
    for row, parts in enumerate(inner.segments):
        real = torch.ones(level.length, dtype=torch.bool) if level.real is None else level.real[row].cpu()
        place_of = torch.full((inner.length,), -1, dtype=torch.int64)
        place_of[slots[row, real]] = real.nonzero().squeeze(-1)
        media = [part.slots.cpu() for part in parts]
        text = slots[row, real]
        text = text[~torch.isin(text, torch.cat(media))] if media else text
        pairs = method.visible(media, text)
        found.append([(_there(place_of[rows]), _there(place_of[columns])) for rows, columns in pairs])
    return found


def _there(places: Tensor) -> Tensor:
    return places[places >= 0]


def _calibration(inner: Inner, reference: Any, frequencies: Tensor, device: torch.device) -> Tensor:
    """Weigh keys by how many tokens they stand for and by their distance.

    The logit of key n for query m gains ``log(s_n (c - D(|m - n|)))`` with ``c = 2`` and
    ``D(t) = 2/d sum_j cos(t theta_j)``: a merged token counts for those it replaced, and the loss by
    which rotary positions weaken distant keys is given back.

    Returns:
        float32 ``[B, 1, K, past + K]``.
    """
    level = inner.levels[0]
    slots = level.slots.to(device)
    sizes = _sizes(inner, device)
    queries = slots + inner.seen
    if reference is not None and reference.stored and reference.slots is not None:
        past = reference.sizes
        past = torch.ones_like(reference.slots, dtype=torch.float32) if past is None else past
        sizes = torch.cat([past.to(device), sizes], dim=1)
        keys = torch.cat([reference.slots.to(device), queries], dim=1)
    else:
        keys = queries
    reach = int((queries.max() - keys.min()).abs()) + 1
    steps = torch.arange(reach, device=device, dtype=torch.float32)
    decay = torch.cos(steps[:, None] * frequencies.to(device).float()).mean(dim=-1)
    distance = (queries[:, :, None] - keys[:, None, :]).abs().clamp_max(reach - 1)
    weights = (2.0 - decay[distance]).clamp_min(1e-6).log() + sizes.log()[:, None, :]
    # A prompt in which nothing was merged stays as it is.
    return torch.where((sizes > 1).any(dim=1)[:, None, None], weights, 0.0)[:, None]


def _sizes(inner: Inner, device: torch.device) -> Tensor:
    """How many tokens each token of the first level stands for, float32 ``[B, K]``."""
    level = inner.levels[0]
    if inner.sizes is None:
        return torch.ones(level.slots.shape, device=device)
    return inner.sizes.to(device).gather(1, level.slots.to(device))
