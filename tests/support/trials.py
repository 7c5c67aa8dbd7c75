"""Methods for tests alone: they do in turn everything that methods inside the language model may do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmfast.token_pruning.base import VisionSignal
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.token_pruning.layers import (
    LayerBypass,
    LayerDropper,
    LayerEvent,
    LayerMask,
    LayerRequest,
    LayerTokens,
    Route,
)
from mmfast.tokens import Keep

EVENTS = (1, 3, 4)
FRACTIONS = (0.8, 0.5, 0.3)

Given = tuple[int, LayerTokens, Tensor | None, Tensor | None]
"""What a method was given: the layer, the tokens, the attention of the rows it asked for, the values."""


@dataclass(frozen=True)
class Trial(LayerDropper):
    """Drop evenly spaced tokens at three layers, and note what was given.

    Attributes:
        needs: what to ask for.
        asks: the request of each event.
        signals: what to ask of the vision tower.
        merge: let survivors take over something, but not every one of them.
        adaptive: leave the counts to the method.
        cuts: as :meth:`truncations` returns it.
        log: takes down what was given, if there is one.
    """

    name: ClassVar[str] = "trial"
    stage: ClassVar[str] = "in_llm"

    needs: frozenset[str] = frozenset()
    asks: tuple[LayerRequest | None, ...] = (None, None, None)
    signals: tuple[tuple[str, VisionSignal], ...] = ()
    merge: bool = False
    adaptive: bool = False
    cuts: tuple[tuple[int, int, int], ...] = ()
    log: list[Given] | None = field(default=None, compare=False)

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        return dict(self.signals)

    def events(self, depth: int) -> list[LayerEvent]:
        return [LayerEvent(layer, step, depth) for step, layer in enumerate(EVENTS)]

    def request(self, event: LayerEvent) -> LayerRequest | None:
        return self.asks[event.step]

    def counts(self, total: int, depth: int, images: int = 1) -> list[int] | None:
        return None if self.adaptive else [max(1, int(fraction * total)) for fraction in FRACTIONS]

    def truncations(self, depth: int) -> list[tuple[int, int, int]]:
        return list(self.cuts)

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor | Keep:
        self._note(tokens, event)
        alive = len(tokens.candidates)
        if kept is None:
            # Prompts with several images keep less, so that rows differ.
            kept = max(1, int(FRACTIONS[event.step] * alive) - event.step * int(tokens.media.max()))
        # What is remembered decides a little: the pattern moves on from event to event.
        turn = tokens.memory.get("turn", 0)
        tokens.memory["turn"] = turn + 1
        survivors = ((uniform_subset(alive, kept) + turn) % alive).sort().values
        if not self.merge:
            return survivors
        mean = tokens.hidden[tokens.candidates].mean(dim=0)
        features = 0.5 * tokens.hidden[tokens.candidates[survivors]] + 0.5 * mean
        features[::3] = float("nan")
        return Keep(survivors, features)

    def _note(self, tokens: LayerTokens, event: LayerEvent) -> None:
        request, attention, values = self.asks[event.step], None, None
        if request is not None:
            view = tokens.view()
            rows = torch.arange(view.length) if request.queries == "all" else torch.tensor([tokens.last_token])
            attention = view.rows(rows)
            values = view.value if request.values or not (request.ahead or not request.rotary) else None
        if self.log is not None:
            self.log.append((event.layer, tokens, attention, values))


@dataclass(frozen=True)
class Detour(LayerBypass):
    """Let two thirds of the candidates take part in some layers, another choice in each.

    Attributes:
        bypass: what the others still do.
        routes_text: whether text may go around too.
        routes_decode: whether generated tokens may.
        layers: the layers.
        gated, faded, replaced: give the route a gate, a factor of what is skipped, other states to show.
        asks: the attention to ask for; where there is one, the last row of it decides.
    """

    name: ClassVar[str] = "detour"
    stage: ClassVar[str] = "in_llm"

    bypass: Literal["skip", "freeze", "attention"] = "skip"
    routes_text: bool = False
    routes_decode: bool = False
    layers: tuple[int, ...] = (0, 2, 3)
    gated: bool = False
    faded: bool = False
    replaced: bool = False
    asks: bool = False

    def layers_of(self, depth: int) -> list[int]:
        return list(self.layers)

    def request(self, layer: int) -> LayerRequest | None:
        return LayerRequest(layer, ahead=True, queries="last") if self.asks else None

    def route(self, tokens: LayerTokens, layer: int, depth: int) -> Route:
        count = len(tokens.candidates)
        places = torch.arange(count)
        weights = 0.5 + (places % 3) * 0.4
        selected = places[(places + layer) % 3 > 0]
        if self.asks:
            row = tokens.view().rows(torch.tensor([tokens.last_token]))[:, 0].mean(dim=0)[tokens.candidates]
            selected = row.topk(max(1, count // 2)).indices.sort().values
        return Route(
            selected,
            gate=weights if self.gated else None,
            skipped=weights.flip(0) if self.faded else None,
            states=0.3 * tokens.hidden[tokens.candidates].flip(0) if self.replaced else None,
        )

    def decode_route(self, normed: Tensor, layer: int) -> Tensor | None:
        return normed[:, 0].clamp_min(0.0)

    def keep_counts(self, visual: int, text: int, depth: int, images: int = 1) -> list[int] | None:
        return None


@dataclass(frozen=True)
class Window(LayerMask):
    """Let every second visual token look at the text after it, and text at all visual tokens."""

    name: ClassVar[str] = "window"
    stage: ClassVar[str] = "in_llm"

    def visible(self, media: Sequence[Tensor], text: Tensor) -> list[tuple[Tensor, Tensor]]:
        pairs: list[tuple[Tensor, Tensor]] = []
        for own in media:
            pairs += [(own[::2], text[text > own[-1]]), (text, own)]
        return pairs


def compare(mine: Given, theirs: Given, close: float) -> None:
    """Check that a method was given the same twice."""
    (layer, tokens, attention, values), (other_layer, others, other_attention, other_values) = mine, theirs
    assert layer == other_layer
    for name in ("candidates", "origin", "media", "total", "media_totals", "last_token", "question", "places"):
        one, two = getattr(tokens, name), getattr(others, name)
        assert one.tolist() == two.tolist() if isinstance(one, Tensor) else one == two, name
    assert len(tokens.layouts) == len(others.layouts)
    for own, other in zip(tokens.layouts, others.layouts, strict=True):
        for name in ("modality", "grid_known", "crop_grid"):
            assert getattr(own, name) == getattr(other, name)
        for name in ("frame", "tile", "row", "col", "is_newline", "crop"):
            assert listed(getattr(own, name)) == listed(getattr(other, name))
    assert tokens.signals.keys() == others.signals.keys()
    pairs = [(getattr(tokens, name), getattr(others, name)) for name in ("hidden", "embeds", "normed", "activations")]
    pairs += [(tokens.signals[name], others.signals[name]) for name in tokens.signals]
    pairs += [(attention, other_attention), (values, other_values)]
    for one, two in pairs:
        assert (one is None) == (two is None)
        if one is not None:
            assert one.shape == two.shape
            assert (one - two).abs().max() < close


def listed(values: Any) -> Any:
    """Turn a tensor into a list; None stays None."""
    return values if values is None else values.tolist()
