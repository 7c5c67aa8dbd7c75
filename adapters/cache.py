"""Cache layers with separate stored and logical length, and how a cache comes to have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from mmfast.kv.cache import LogicalLength

_PLAIN: dict[type, tuple[type, ...]] = {
    DynamicCache: (DynamicLayer, DynamicSlidingWindowLayer),
    StaticCache: (StaticLayer, StaticSlidingWindowLayer),
}
"""Kinds of caches that can be taken over, with the kinds of their layers."""


class LogicalLayer(LogicalLength, DynamicLayer):  # type: ignore[misc]
    """A growing layer that reports the length of the prompt as the user passed it."""

    def __init__(self) -> None:
        super().__init__()
        self.start_logical()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new keys and values and book them."""
        self.account(key_states.shape[0], key_states.shape[-2], key_states.device)
        stored: tuple[Tensor, Tensor] = DynamicLayer.update(self, key_states, value_states)
        return stored

    def get_seq_length(self) -> int:
        """Return the logical length."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys for the mask."""
        return self.mask_sizes(query_length)

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.start_logical()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens; a positive value is the length to keep."""
        if not self.is_initialized:
            return
        drop = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if self.stored:
            self.drop_last(drop)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, beam_idx.to(self.keys.device))
            self.values = self.values.index_select(0, beam_idx.to(self.values.device))
            self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)
            self.repeat_rows(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self.keys is not None and self.values is not None:
            rows = indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices
            self.keys = self.keys[rows.to(self.keys.device)]
            self.values = self.values[rows.to(self.values.device)]
            self.select_rows(rows)


class LogicalSlidingLayer(LogicalLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding-window layer that stores every kept token.

    The window is measured in the places the tokens had before pruning, so which tokens are inside it
    is decided per row by a mask (see ``layers.py``) and nothing can be thrown away by counting.
    """

    is_sliding = True

    def __init__(self, sliding_window: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window)
        self.start_logical()

    def activate_past_recording(self) -> None:
        """Do nothing: the past is always there."""


def is_logical(cache: object) -> bool:
    """Say whether the layers of a cache have been replaced by logical ones."""
    return isinstance(cache, Cache) and bool(cache.layers) and isinstance(cache.layers[0], LogicalLength)


def refuse_unsupported(cache: object) -> None:
    """Refuse caches whose layers cannot hold a pruned prompt.

    Raises:
        ValueError: naming the kind of cache and what to use.
    """
    kinds = _PLAIN.get(type(cache), ())
    plain = all(type(layer) in kinds or isinstance(layer, LogicalLength) for layer in getattr(cache, "layers", []))
    offloading = bool(getattr(cache, "offloading", False))
    if not kinds or offloading or not plain:
        raise ValueError(
            f"a plan that drops tokens needs a plain DynamicCache or StaticCache, got {type(cache).__name__}"
            f"{' with offloading' if offloading else ''}; leave cache_implementation at its default or set it to "
            "'static' (to hold a cache in fewer bits, add a method that packs to the plan, such as kivi())"
        )


def adopt(cache: DynamicCache, depth: int, past_valid: Tensor | None) -> None:
    """Replace the layers of ``cache`` by logical ones that hold the same tokens.

    Args:
        cache: a plain dynamic cache, empty or filled by earlier turns.
        depth: number of decoder layers.
        past_valid: ``[B, seen]`` bool, which tokens of earlier turns are real; None = all.
    """
    cache.layer_class_to_replicate = None
    cache.layers = [_replacement(cache.layers[i] if i < len(cache.layers) else None, past_valid) for i in range(depth)]
    for layer in cache.layers:
        layer.peers = cache.layers


def _replacement(layer: Any, past_valid: Tensor | None) -> LogicalLayer:
    if isinstance(layer, LogicalLayer):
        return layer
    sliding = isinstance(layer, DynamicSlidingWindowLayer)
    fresh = LogicalSlidingLayer(layer.sliding_window) if sliding else LogicalLayer()
    if layer is None or not layer.is_initialized or layer.keys.numel() == 0:
        return fresh
    return filled_with(fresh, layer.keys, layer.values, layer.get_seq_length(), past_valid)


def filled_with(
    fresh: LogicalLayer, keys: Tensor, values: Tensor, seen: int, past_valid: Tensor | None
) -> LogicalLayer:
    """Let an empty layer hold what another one has stored.

    Args:
        fresh: the empty layer.
        keys: ``[B, G, P, d]``, of the last P tokens.
        values: ``[B, G, P, d]``.
        seen: tokens so far.
        past_valid: ``[B, seen]`` bool, which of them are real; None = all.
    """
    batch, _, stored, _ = keys.shape
    fresh.lazy_initialization(keys, values)
    fresh.keys, fresh.values = keys, values
    fresh.seen = seen
    fresh.slots = torch.arange(seen - stored, seen, device=keys.device).expand(batch, stored)
    if past_valid is not None:
        fresh.valid = past_valid[:, -stored:].to(keys.device)
    return fresh


def reference_layer(cache: Any) -> Any:
    """Return the layer after which transformers sizes its masks and counts positions: the first not sliding."""
    return next((layer for layer in cache.layers if not layer.is_sliding), cache.layers[0])
