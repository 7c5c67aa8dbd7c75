"""Later turns of a conversation: choose anew for a new question, from features that were kept aside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor

from mmfast.adapters.base import Adapter
from mmfast.adapters.cache import is_logical
from mmfast.adapters.ledger import Ledger
from mmfast.adapters.media import FEATURE_KEYS
from mmfast.adapters.recorder import Recorder
from mmfast.adapters.static import renewed_layers

BESIDE = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "image_sizes", "pixel_attention_mask")
"""Inputs that go with pixel values; what else depends on the family is found by its shape."""
PER_TOKEN = ("mm_token_type_ids", "token_type_ids")
"""Inputs that say something of each token; text that follows gets zeros."""


@dataclass
class _Media:
    """What a conversation has brought: inputs by name, and what the encoder made of them."""

    inputs: dict[str, Any]
    features: dict[str, tuple[Tensor, Any]] = field(default_factory=dict)


class Turns:
    """Read a conversation again when a new question follows, so that it is the new question that chooses.

    Args:
        adapter: the adapter of the model.
        recorder: is told what was read again.
    """

    def __init__(self, adapter: Adapter, recorder: Recorder) -> None:
        self.adapter, self.recorder = adapter, recorder
        self._known: WeakKeyDictionary[Any, _Media] = WeakKeyDictionary()
        self._current: _Media | None = None

    def attach(self, ledger: Ledger) -> None:
        """Wrap the model's ``generate``."""
        ledger.set_attribute(self.adapter.model, "generate", self._wrapped(self.adapter.model.generate))

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            media = {name: kwargs[name] for name in (*FEATURE_KEYS, *BESIDE) if kwargs.get(name) is not None}
            if self._follows(cache):
                kwargs = self._again(cache, media, args, kwargs)
            elif media:
                beside = {name: kwargs[name] for name in PER_TOKEN if kwargs.get(name) is not None}
                self._current = _Media({**media, **beside})
            try:
                return original(*args, **kwargs)
            finally:
                self._current = None

        return generate

    def _follows(self, cache: Any) -> bool:
        return cache is not None and is_logical(cache) and cache in self._known and cache.get_seq_length() > 0

    def _again(self, cache: Any, new: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Empty the cache and bring back what earlier turns brought."""
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.shape[1] <= cache.get_seq_length():
            raise ValueError(
                'on_new_turn="reselect" reads the conversation again and needs all of its tokens: pass the whole '
                "input_ids to generate(), with the answers so far and the new question"
            )
        known = self._known[cache]
        inputs = dict(known.inputs)
        for name, value in new.items():
            inputs[name] = torch.cat([inputs[name], value]) if name in inputs else value
        for name in PER_TOKEN:
            given = kwargs.get(name, inputs.get(name))
            if given is not None:
                inputs[name] = torch.nn.functional.pad(given, (0, ids.shape[1] - given.shape[1]))
        self.recorder.reread = cache.get_seq_length()
        config = self.adapter.text_config
        if isinstance(cache, transformers.StaticCache):
            cache.layers = renewed_layers(cache, config)
        else:
            cache.layers = transformers.DynamicCache(config=config).layers
        self._current = _Media(inputs, {} if new else known.features)
        return {**kwargs, **inputs}

    def adopted(self, cache: Any) -> None:
        """Remember to which conversation a cache belongs."""
        if self._current is not None:
            self._known[cache] = self._current

    def encoded(self, modality: str, pixels: Any) -> Any:
        """Return the features of the same pixels, if they have been kept aside."""
        found = None if self._current is None else self._current.features.get(modality)
        return found[1] if found is not None and found[0] is pixels else None

    def keep(self, modality: str, pixels: Any, output: Any) -> None:
        """Keep features aside for later turns."""
        if self._current is not None and isinstance(pixels, Tensor):
            self._current.features[modality] = (pixels, output)
