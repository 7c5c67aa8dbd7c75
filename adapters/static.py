"""Static caches of transformers: layers whose buffers stay in place, and what else they need of ``generate``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticCache, StaticSlidingWindowLayer

from mmfast.adapters.cache import LogicalLayer, LogicalSlidingLayer, adopt, filled_with, is_logical
from mmfast.adapters.ledger import Ledger
from mmfast.kv.static import FixedStates

_LENGTH = "_mmfast_length"


class StaticLogicalLayer(FixedStates, LogicalLayer):
    """A logical layer of a static cache.

    Args:
        limit: logical tokens the cache is made for.
    """

    def __init__(self, limit: int) -> None:
        self.start_fixed(limit)
        LogicalLayer.__init__(self)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, in place once the first prompt is settled, and book them."""
        if not self.capacity:
            return super().update(key_states, value_states)
        self.account(key_states.shape[0], key_states.shape[-2], key_states.device)
        return self.write(key_states, value_states)

    def get_max_length(self) -> int:
        """Return the logical length the cache is made for."""
        return self.limit


class StaticLogicalSlidingLayer(StaticLogicalLayer, LogicalSlidingLayer):
    """A sliding-window layer of a static cache; it stores every kept token.

    Args:
        limit: logical tokens the cache is made for.
        sliding_window: length of the window.
    """

    def __init__(self, limit: int, sliding_window: int) -> None:
        self.start_fixed(limit)
        LogicalSlidingLayer.__init__(self, sliding_window)


# --------------------------------------------------------------------------- caches


def is_static(cache: object) -> bool:
    """Say whether a cache is static and still has the layers transformers gave it."""
    return isinstance(cache, StaticCache) and not is_logical(cache)


def take_over(cache: Cache, depth: int, past_valid: Tensor | None) -> None:
    """Replace the layers of a dynamic or static cache by logical ones that hold the same tokens.

    Args:
        cache: a plain one, empty or filled by earlier turns.
        depth: number of decoder layers.
        past_valid: ``[B, seen]`` bool, which tokens of earlier turns are real; None = all.
    """
    if not isinstance(cache, StaticCache):
        adopt(cache, depth, past_valid)
        return
    limit = _limit(cache)
    cache.layers = [_replacement(layer, limit, past_valid) for layer in cache.layers]
    for layer in cache.layers:
        layer.peers = cache.layers


def _limit(cache: StaticCache) -> int:
    """Return how many tokens a static cache is made for.

    ``generate`` makes them as long as any it has made before, and sliding layers know of their window alone.
    """
    lengths = [layer.limit if isinstance(layer, FixedStates) else layer.max_cache_len for layer in cache.layers]
    return int(getattr(cache, _LENGTH, max(lengths)))


def _replacement(layer: Any, limit: int, past_valid: Tensor | None) -> LogicalLayer:
    fresh = (
        StaticLogicalSlidingLayer(limit, layer.max_cache_len)
        if isinstance(layer, StaticSlidingWindowLayer)
        else StaticLogicalLayer(limit)
    )
    seen = int(layer.get_seq_length())
    stored = min(seen, layer.max_cache_len)
    if not layer.is_initialized or not stored:
        return fresh
    return filled_with(fresh, layer.keys[:, :, :stored], layer.values[:, :, :stored], seen, past_valid)


def renewed_layers(cache: StaticCache, config: Any) -> list[Any]:
    """Return the layers of a new static cache that is as long as this one."""
    layers: list[Any] = StaticCache(config=config, max_cache_len=_limit(cache)).layers
    return layers


def settle(cache: Any) -> None:
    """Let the layers of a static cache move into buffers of their final size, at the end of a prompt."""
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            if isinstance(layer, FixedStates):
                layer.settle()


def refuse_packing(cache: object, packer: Any) -> None:
    """Refuse a method that packs on a static cache.

    Raises:
        ValueError: saying what to use.
    """
    if packer is not None and isinstance(cache, StaticCache):
        raise ValueError(
            f"method {packer.name!r} packs a cache into blocks of its own, which cannot stand in the fixed buffers of "
            "a StaticCache; leave cache_implementation at its default for it"
        )


# ---------------------------------------------------------------------------- masks


def readable_mask(named: Mapping[str, Any]) -> Tensor | None:
    """Return the 2-D mask of a call that brings images or videos.

    ``generate`` writes the mask of a static cache out in 4-D, one column for each token the cache has room for.
    Which tokens are real can be read off: padding is what no token sees.

    Args:
        named: the arguments of the outer model.

    Returns:
        ``[B, seen + S]``, or None where there is none or all is visible.
    """
    mask, cache = named.get("attention_mask"), named.get("past_key_values")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask
    if not is_static(cache) or mask is None:
        return None
    layer = _first_layer(cache, sliding=False)
    if isinstance(mask, Mapping):
        mask = mask.get("sliding_attention" if layer.is_sliding else "full_attention")
        if mask is None or mask.ndim == 2:
            return mask
    tokens = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
    offset, end = _columns(layer, tokens.shape[1])
    visible = (_visible(mask[:, 0, :, :end])).any(dim=1).expand(tokens.shape[0], -1)
    return torch.nn.functional.pad(visible, (offset, 0))


def fit_masks(kwargs: dict[str, Any], cache: object, query: int, *, keep: bool) -> None:
    """Take the columns that stand for the room of a static cache out of the masks a decoder was handed.

    Args:
        kwargs: the arguments of the decoder, which are changed.
        cache: its cache.
        query: tokens of this call.
        keep: whether the masks say more than which tokens are real; else they are left out.
    """
    mask = kwargs.get("attention_mask")
    if not is_static(cache) or mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return
    if not keep:
        kwargs["attention_mask"] = None
    elif isinstance(mask, Mapping):
        kwargs["attention_mask"] = {
            name: _cut(value, _first_layer(cache, sliding=name == "sliding_attention"), query)
            for name, value in mask.items()
        }
    else:
        kwargs["attention_mask"] = _cut(mask, _first_layer(cache, sliding=False), query)


def _first_layer(cache: Any, *, sliding: bool) -> Any:
    return next((layer for layer in cache.layers if layer.is_sliding is sliding), cache.layers[0])


def _columns(layer: Any, query: int) -> tuple[int, int]:
    """Return the logical place of the first column of a mask, and how many columns there are up to the last token."""
    offset = int(layer.get_mask_sizes(query)[1])
    return offset, int(layer.get_seq_length()) + query - offset


def _cut(mask: Tensor | None, layer: Any, query: int) -> Tensor | None:
    return mask if mask is None or mask.ndim == 2 else mask[..., : _columns(layer, query)[1]]


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


# ------------------------------------------------------------------------- generate


def watch_generate(model: nn.Module, ledger: Ledger) -> None:
    """Let ``generate`` say how long a static cache has to be, and keep it from compiling the model.

    Hooks that look at numbers cannot be part of a compiled graph.
    """
    for name, wrap in (("_prepare_static_cache", _measured), ("_valid_auto_compile_criteria", _never)):
        original = getattr(model, name, None)
        if original is not None:
            ledger.set_attribute(model, name, wrap(original))


def _measured(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @wraps(original)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        cache = original(*args, **kwargs)
        setattr(cache, _LENGTH, signature.bind(*args, **kwargs).arguments["max_cache_len"])
        return cache

    return prepare


def _never(original: Callable[..., Any]) -> Callable[..., bool]:
    @wraps(original)
    def compiles(*args: Any, **kwargs: Any) -> bool:
        return False

    return compiles
