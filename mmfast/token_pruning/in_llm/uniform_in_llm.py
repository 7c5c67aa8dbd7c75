"""Uniform dropping inside the language model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmfast.budget import check_keep, resolve_layer
from mmfast.registry import register
from mmfast.token_pruning.base import LayerDropper, LayerEvent, LayerTokens
from mmfast.token_pruning.before_llm.uniform import uniform_subset


@register("uniform_in_llm", stage="in_llm")
@dataclass(frozen=True)
class UniformInLLM(LayerDropper):
    """Keep evenly spaced visual tokens, from one layer on.

    Attributes:
        keep: visual tokens left after the drop; int = count per image, float = fraction.
        layer: first layer that reads the shortened prompt, as index (int) or relative depth (float).
    """

    keep: int | float = 0.5
    layer: int | float = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)

    def events(self, depth: int) -> list[LayerEvent]:
        """Return the single event."""
        return [LayerEvent(resolve_layer(self.layer, depth), self.keep)]

    def choose(self, tokens: LayerTokens, kept: int, event: LayerEvent) -> Tensor:
        """Return evenly spaced candidates."""
        return uniform_subset(tokens.candidates.numel(), kept).to(tokens.candidates.device)
