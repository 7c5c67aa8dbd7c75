"""Methods that do little but note what they were given of the vision encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import mmfast
from mmfast.plan import Plan
from mmfast.token_pruning.base import Merger, Selector, VisionSignal
from mmfast.token_pruning.layers import DropOnce, LayerEvent, LayerScorer, LayerTokens
from mmfast.tokens import Keep, VisualTokens
from support.families import Batch, cast

Wanted = tuple[tuple[str, VisionSignal], ...]


def wanted(**signals: VisionSignal) -> Wanted:
    """Name some signals."""
    return tuple(signals.items())


@dataclass(frozen=True)
class Probe(Selector):
    """Keep the first tokens, and note what came with them."""

    name: ClassVar[str] = "probe"
    stage: ClassVar[str] = "before_llm"
    seen: ClassVar[list[VisualTokens]] = []

    signals: Wanted = ()

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        return dict(self.signals)

    def __call__(self, tokens: VisualTokens) -> Keep | None:
        self.seen.append(tokens)
        return super().__call__(tokens)

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        return torch.arange(kept, device=tokens.features.device)


@dataclass(frozen=True)
class Returned(Merger):
    """Keep the first tokens, handed back as features of the encoder, or with those of later tokens."""

    name: ClassVar[str] = "returned"
    stage: ClassVar[str] = "before_llm"
    merges: ClassVar[bool] = True

    layer: Any = "features"
    shift: int = 0

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        return {"patch_features": VisionSignal("patch_features", self.layer)}

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        features = tokens.signals["patch_features"][self.shift : kept + self.shift]
        return Keep(torch.arange(kept), features, space="vision")


@dataclass(frozen=True)
class InnerProbe(DropOnce, LayerScorer):
    """Drop the last candidates, and note what came with the candidates."""

    name: ClassVar[str] = "inner_probe"
    stage: ClassVar[str] = "in_llm"
    seen: ClassVar[list[LayerTokens]] = []

    signals: Wanted = ()

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        return dict(self.signals)

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        self.seen.append(tokens)
        return -torch.arange(len(tokens.candidates), dtype=torch.float32)


def probe(batch: Batch, signals: Wanted, model: Any = None) -> list[VisualTokens]:
    """Return what a method before the language model gets, for each image or video."""
    model = batch.family.model() if model is None else model
    Probe.seen.clear()
    with mmfast.accelerate(model, Plan((Probe(keep=1, signals=signals),))), torch.no_grad():
        model(**cast(batch.inputs, model.dtype))
    found = list(Probe.seen)
    Probe.seen.clear()
    return found
