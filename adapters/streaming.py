"""A video that keeps arriving, in a cache that does not grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from mmfast.adapters.attention import Capture, register_tap, tap_name, watch
from mmfast.adapters.base import Adapter
from mmfast.adapters.cache import adopt, reference_layer
from mmfast.adapters.ledger import Ledger
from mmfast.adapters.media import FEATURE_KEYS
from mmfast.adapters.shared import SharedPrefix, prefix_of, refuse_padding
from mmfast.kv.base import Evictor
from mmfast.kv.entries import Entries, Retained
from mmfast.token_pruning.attention import AttentionView


class Stream:
    """The cache of one stream; the plan that shortens what arrives is at work on the model meanwhile.

    Args:
        adapter: the adapter of the model.
        evictor: decides which visual entries stay.
        budget: how many of them each layer and head may hold.
    """

    def __init__(self, adapter: Adapter, evictor: Evictor, budget: int) -> None:
        self.adapter, self.evictor, self.budget = adapter, evictor, budget
        self.cache = transformers.DynamicCache(config=adapter.text_config)
        adopt(self.cache, adapter.shape.layers, None)
        self.visual = torch.zeros(0, dtype=torch.bool)
        self.next = 0

    @property
    def seen(self) -> int:
        """Tokens that have arrived."""
        return int(self.visual.numel())

    @property
    def held(self) -> list[int]:
        """Visual entries that each layer holds, the most of its heads."""
        return [int(self._visual_entries(layer).sum(dim=-1).max()) for layer in self.cache.layers]

    @torch.no_grad()
    def add(self, inputs: Mapping[str, Any], tokens_per_frame: Callable[[], int]) -> None:
        """Read tokens that follow those there are, then evict down to the budget.

        Args:
            inputs: of one unpadded prompt.
            tokens_per_frame: says, once they have been read, how many visual tokens of one frame entered the
                language model; 0 = not known.

        Raises:
            ValueError: if the prompt is padded.
        """
        refuse_padding(inputs)
        ids = inputs["input_ids"]
        given = {name: value for name, value in inputs.items() if name != "attention_mask"}
        positions = self.adapter.prompt_positions(inputs, self.next)
        captures: dict[int, Capture] = {}
        with self._listening(captures):
            self.adapter.model(
                **given,
                attention_mask=torch.ones(1, self.seen + ids.shape[1], dtype=torch.int64, device=ids.device),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.next = int(positions.max()) + 1
        brings = any(inputs.get(key) is not None for key in FEATURE_KEYS)
        placeholders = torch.tensor(list(self.adapter.placeholders.values()))
        own = torch.isin(ids[0].cpu(), placeholders) if brings else torch.zeros(ids.shape[1], dtype=torch.bool)
        self.visual = torch.cat([self.visual, own])
        frame = tokens_per_frame()
        for index, layer in enumerate(self.cache.layers):
            if not layer.is_sliding:
                self._evict(index, layer, captures.get(index), frame)

    @contextmanager
    def _listening(self, captures: dict[int, Capture]) -> Iterator[None]:
        """Note the queries of each layer, for methods that read attention."""
        if "attention" not in self.evictor.needs:
            yield
            return
        config, ledger = self.adapter.text_config, Ledger()
        before = config._attn_implementation_internal
        try:
            register_tap(before, ledger)
            ledger.enter(lambda: setattr(config, "_attn_implementation_internal", before))
            config._attn_implementation_internal = tap_name(before)
            for index, layer in enumerate(self.adapter.layers):
                captures[index] = Capture(torch.zeros(1, 0, dtype=torch.int64))
                ledger.enter(watch(self.adapter.attention(layer), captures[index]))
            yield
        finally:
            ledger.undo()

    def _visual_entries(self, layer: Any) -> Tensor:
        """Say which stored entries are visual, bool ``[G, P]``."""
        real = layer.real_entries()[0]
        places = layer.slots[0].expand_as(real) if layer.places is None else layer.places[0]
        visual: Tensor = self.visual.to(real.device)[places.long()] & real
        return visual

    def _evict(self, index: int, layer: Any, capture: Capture | None, tokens_per_frame: int) -> None:
        chosen = self._visual_entries(layer)
        held = int(chosen.sum(dim=-1).max())
        if held <= self.budget:
            return
        # Heads hold different entries, but equally many: what is looked at are each head's own, in order.
        columns = chosen.nonzero()[:, 1].view(chosen.shape[0], -1)
        wide = columns[..., None].expand(-1, -1, layer.keys.shape[-1])
        keys, values = layer.keys[0].gather(1, wide), layer.values[0].gather(1, wide)
        entries = Entries(
            keys,
            values,
            torch.ones(held, dtype=torch.bool, device=keys.device),
            torch.zeros(held, dtype=torch.int64, device=keys.device),
            torch.arange(held, device=keys.device) // (tokens_per_frame or held),
            index,
            self.adapter.shape.layers,
            attention=None if capture is None else _latest(capture, keys, values),
        )
        retained = self.evictor.retain(entries, self.budget)
        layer.retain([(columns, Retained(retained.by_head(len(keys)), retained.keys, retained.values, retained.bias))])
        layer.floor = layer.seen

    def continue_with(self, questions: Sequence[Sequence[int]], steps: int, ends: Sequence[int]) -> list[list[int]]:
        """Answer questions on what is held now; the stream does not change."""
        layers = [prefix_of(layer) for layer in self.cache.layers]
        seen = reference_layer(self.cache).get_seq_length()
        return SharedPrefix(self.adapter, layers, seen, self.next).generate(questions, steps, ends)


def _latest(capture: Capture, keys: Tensor, values: Tensor) -> AttentionView:
    """Show the attention of the newest tokens to the visual entries: they stand where the last of these do."""
    if capture.query is None:
        raise RuntimeError("an attention module was not run between the request for its attention and its use")
    query = capture.query[0][:, -keys.shape[1] :]
    silent = torch.ones(keys.shape[1], dtype=torch.bool, device=keys.device)
    silent[keys.shape[1] - query.shape[1] :] = False
    padded = torch.nn.functional.pad(query, (0, 0, keys.shape[1] - query.shape[1], 0))
    return AttentionView(padded, keys, values, capture.scaling, capture.softcap, None, silent)
