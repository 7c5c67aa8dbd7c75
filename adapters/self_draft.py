"""Let a model draft for itself: in its own cache with sublayers left out, or in a copy of a part of that cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mmfast.adapters.attention import Capture
from mmfast.adapters.base import Adapter
from mmfast.adapters.cache import LogicalLayer, LogicalSlidingLayer, reference_layer
from mmfast.adapters.call import Inner
from mmfast.adapters.ledger import Ledger
from mmfast.adapters.masks import pack
from mmfast.adapters.packed import PackedLayer
from mmfast.adapters.reading import capture_attention, switch_on_tap
from mmfast.kv.cache import BOOKS, Announcement

if TYPE_CHECKING:
    from mmfast.adapters.rounds import ModelRounds


class SelfDraft:
    """Steps of a model between its rounds, of which nothing stays.

    Args:
        rounds: the model with the cache to draft in.
        source: the model with its own cache, where ``rounds`` has a copy of a part of it; None where it has
            the cache itself.
    """

    def __init__(self, rounds: ModelRounds, source: ModelRounds | None = None) -> None:
        self.rounds, self.source = rounds, source
        self.adapter = rounds.binding.adapter
        self._depth = 0

    # ------------------------------------------------------------------ the model

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return self.adapter.shape.layers

    @cached_property
    def fixed(self) -> frozenset[int]:
        """Layers that have to run: the first, the last, and those whose caches masks are measured by."""
        layers = self.rounds.cache.layers
        found = {0, self.depth - 1, layers.index(reference_layer(self.rounds.cache))}
        sliding = [index for index, layer in enumerate(layers) if layer.is_sliding]
        return frozenset(found | set(sliding[:1]))

    @property
    def rereads(self) -> bool:
        """Whether answers can be run anew; not where they have been packed."""
        return not any(isinstance(layer, PackedLayer) for layer in self.rounds.cache.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the decoder and the output layer, which every step reads."""
        head = self.adapter.model.get_output_embeddings()
        weights = {
            id(weight): weight
            for part in (self.adapter.layers, [head])
            for layer in part
            for weight in layer.parameters()
        }
        return sum(weight.numel() * weight.element_size() for weight in weights.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, which every step reads."""
        layers = self.rounds.cache.layers
        return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))

    # ---------------------------------------------------------------------- steps

    @contextmanager
    def drafting(self, attention: Collection[int] = (), feed_forward: Collection[int] = ()) -> Iterator[None]:
        """Let steps run without some sublayers; afterwards model and cache are as they were.

        Args:
            attention: layers whose attention is left out.
            feed_forward: layers whose feed-forward part is left out.
        """
        binding, ledger = self.rounds.binding, Ledger()
        onlooker, steps = binding.onlooker, binding.recorder.steps
        layers = self.rounds.cache.layers
        before = [(layer.stored, {name: getattr(layer, name) for name in BOOKS}) for layer in layers]
        self._depth = 0
        try:
            binding.onlooker = self.rounds
            for index in attention:
                ledger.set_attribute(self.adapter.attention(self.adapter.layers[index]), "forward", _no_attention)
            for index in feed_forward:
                ledger.set_attribute(self.adapter.feed_forward(self.adapter.layers[index]), "forward", _nothing)
            yield
        finally:
            ledger.undo()
            binding.onlooker, binding.recorder.steps = onlooker, steps
            for layer, (stored, books) in zip(layers, before, strict=True):
                _forget(layer, stored, books)

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Run one token of each row; those that are not named rest.

        Returns:
            ``[B, V]`` logits of what follows; of rows that rest they mean nothing.
        """
        batch, device = len(self.rounds.added), self.adapter.model.device
        filler = next(iter(tokens.values()))
        ids = torch.tensor([[tokens.get(row, filler)] for row in range(batch)], device=device)
        real = None
        if len(tokens) < batch:
            real = torch.tensor([[row in tokens] for row in range(batch)], device=device)
        depth = torch.full_like(ids, self._depth)
        self._depth += 1
        found: Tensor = self.rounds.forward(ids, real, depth, None).logits[:, 0]
        return found

    def reread(self, answers: Mapping[int, Sequence[int]]) -> Tensor:
        """Run beginnings of answers in one forward, straight after their prompts.

        Args:
            answers: row -> its first tokens; rows that are not named rest.

        Returns:
            ``[B, n, V]`` logits of what follows each; behind the end of a row they mean nothing.
        """
        rounds, device = self.rounds, self.adapter.model.device
        batch, longest = len(rounds.added), max(map(len, answers.values()))
        ids = torch.tensor(next(iter(answers.values()))[:1], device=device).repeat(batch, longest)
        real = torch.zeros(batch, longest, dtype=torch.bool)
        for row, own in answers.items():
            ids[row, : len(own)] = torch.tensor(list(own), device=device)
            real[row, : len(own)] = True
        for layer in rounds.cache.layers:
            _hide(layer, rounds.seen)
        added, rounds.added = rounds.added, [0] * batch
        try:
            depth = torch.arange(longest, device=device).expand(batch, -1)
            found: Tensor = rounds.forward(ids, None if bool(real.all()) else real.to(device), depth, None).logits
        finally:
            rounds.added = added
        return found

    # ----------------------------------------------------------- a part of the cache

    def visual(self) -> list[Tensor]:
        """Return per row the ``[N]`` int64 places of the visual tokens of the prompt that entered the decoder."""
        inner = self.rounds.prompt
        level = inner.levels[0]
        found = []
        for row in range(level.slots.shape[0]):
            parts = [part.slots.cpu() for part in inner.segments[row]] if inner.segments else []
            slots = level.slots[row].cpu()
            slots = slots if level.real is None else slots[level.real[row].cpu()]
            places = torch.cat(parts).sort().values if parts else torch.empty(0, dtype=torch.int64)
            found.append(places[torch.isin(places, slots)])
        return found

    def scores(self) -> list[Tensor]:
        """Return per row, for each of :meth:`visual`, the float32 attention that the text behind images gave it."""
        watch = self.rounds.scores
        if watch is None:
            raise RuntimeError("attention was not read while the prompt was")
        return [watch.of(row)[places] for row, places in enumerate(self.visual())]

    def part(self, kept: Sequence[Tensor]) -> SelfDraft:
        """Copy the cache without some visual tokens of the prompt.

        Args:
            kept: per row, which of :meth:`visual` stay, int64 indices.
        """
        rounds, seen = self.rounds, self.rounds.prompt.seen
        gone = []
        for places, stay in zip(self.visual(), kept, strict=True):
            leaves = torch.ones(len(places), dtype=torch.bool)
            leaves[stay.cpu()] = False
            gone.append(places[leaves] + seen)
        cache = DynamicCache()
        cache.layer_class_to_replicate = None
        cache.layers = [_without(layer, gone) for layer in rounds.cache.layers]
        for layer in cache.layers:
            layer.peers = cache.layers
        return SelfDraft(rounds.beside(cache), rounds)

    def follow(self) -> None:
        """Copy what the model itself has stored of the answers since the last time."""
        own, source = self.rounds, self.source
        if source is None or own.added == source.added:
            return
        device = own.cache.layers[0].slots.device
        begin = torch.tensor(own.added, device=device) + own.seen
        for layer, other in zip(own.cache.layers, source.cache.layers, strict=True):
            new = other.slots >= begin.to(other.slots.device)[:, None]
            order, real = pack(new if other.valid is None else new & other.valid)
            wanted = order[:, None, :, None]
            keys, values = (
                states.gather(2, wanted.expand(-1, states.shape[1], -1, states.shape[-1]))
                for states in (other.keys, other.values)
            )
            slots = other.slots.gather(1, order) - layer.seen
            layer.announced = Announcement(order.shape[1], real, slots)
            layer.update(keys, values)
        own.grown(source.added, order.shape[1])


class VisualScores:
    """Add up, while a prompt is read, what the text behind its images looks at.

    Args:
        adapter: the adapter of the model.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._sums: list[Tensor] = []

    def of(self, row: int) -> Tensor:
        """Return float32 ``[S]``: mean over layers, heads and queries of the attention each place was given."""
        return self._sums[row] / self.adapter.shape.layers

    def arm(self, inner: Inner) -> None:
        """Watch all layers of a call that brings a prompt."""
        self._sums = [torch.zeros(inner.length) for _ in range(inner.levels[0].slots.shape[0])]
        if inner.length == 1 or not any(inner.segments):
            return
        switch_on_tap(self.adapter, inner)
        for index, layer in enumerate(self.adapter.layers):
            self._watch(inner, index)
            inner.undo.append(layer.register_forward_hook(self._after(inner, index)).remove)

    def _watch(self, inner: Inner, index: int) -> None:
        def note(capture: Capture) -> None:
            level = inner.attending.get(index)
            if level is not None:
                # Where tokens are shown but do not attend, fewer attend than are read.
                capture.slots, capture.real = level.slots, level.real
            inner.tables["draft capture", index] = capture

        capture_attention(self.adapter, inner, index, note)

    def _after(self, inner: Inner, index: int) -> Any:
        def after(layer: Any, args: Any, output: Any) -> None:
            capture: Capture | None = inner.tables.pop(("draft capture", index), None)
            if capture is None or capture.query is None:
                return
            with torch.no_grad():
                for row, parts in enumerate(inner.segments):
                    if parts:
                        self._add(capture, row, max(int(part.slots.max()) for part in parts))

        return after

    def _add(self, capture: Capture, row: int, last: int) -> None:
        slots = capture.slots[row].cpu()
        places = torch.arange(len(slots)) if capture.real is None else capture.real[row].cpu().nonzero().squeeze(-1)
        own = slots[places]
        asking = own > last
        if not bool(asking.any()):
            asking[-1] = True
        view = capture.view(row, None if len(places) == len(slots) else places)
        weights = (asking.float() / asking.sum()).to(view.query.device)
        self._sums[row][own] += view.column_sums(weights).cpu()


def _nothing(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stand in for a feed-forward part that adds nothing."""
    return torch.zeros_like(hidden)


def _no_attention(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Stand in for attention that adds nothing and stores nothing."""
    return torch.zeros_like(hidden_states), None


def _forget(layer: Any, stored: int, books: Mapping[str, Any]) -> None:
    """Take back what has come into a layer since its books stood so."""
    layer.announced = None
    extra = layer.stored - stored
    if extra > 0:
        layer.keep_block(extra, torch.zeros(layer.slots.shape[0], 0, dtype=torch.int64), None)
    for name, value in books.items():
        setattr(layer, name, value)
    for book in layer.prompts or []:
        if book is not None:
            book.trail = []


def _hide(layer: Any, begin: int) -> None:
    """Take what stands at ``begin`` and behind for empty, until the books are put back."""
    before = layer.slots < begin
    layer.valid = before if layer.valid is None else layer.valid & before
    if layer.heads is not None:
        layer.heads = layer.heads & (before[:, None] if layer.places is None else layer.places < begin)
    layer.history = hash((layer.history, -5))


def _without(layer: Any, gone: Sequence[Tensor]) -> LogicalLayer:
    """Copy a layer of the cache without some places, given row by row."""
    keys, values = layer.keys, layer.values
    fresh = LogicalSlidingLayer(layer.sliding_window) if layer.is_sliding else LogicalLayer()
    fresh.lazy_initialization(keys, values)
    fresh.keys, fresh.values = keys, values
    for name in BOOKS:
        setattr(fresh, name, getattr(layer, name))
    keep = layer.real_entries().clone()
    where = layer.slots[:, None] if layer.places is None else layer.places
    for row, places in enumerate(gone):
        keep[row] &= ~torch.isin(where[row], places.to(where))
    fresh.compact(keep)
    return fresh
