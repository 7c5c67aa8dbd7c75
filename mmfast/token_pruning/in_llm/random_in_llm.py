"""Random dropping inside the language model: the baseline for every in-LLM method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.budget import check_keep, resolve_layer
from mmfast.registry import register
from mmfast.token_pruning.base import LayerEvent, LayerScorer, LayerTokens
from mmfast.token_pruning.before_llm.random import random_subset


@register("random_in_llm", stage="in_llm")
@dataclass(frozen=True)
class RandomInLLM(LayerScorer):
    """Keep a random subset of the visual tokens, from one layer on.

    Attributes:
        keep: visual tokens left after the drop; int = count per image, float = fraction.
        layer: first layer that reads the shortened prompt, as index (int) or relative depth (float).
        seed: seed of the draw; report at least three.
    """

    keep: int | float = 0.5
    layer: int | float = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)

    def events(self, depth: int) -> list[LayerEvent]:
        """Return the single event."""
        return [LayerEvent(resolve_layer(self.layer, depth), self.keep)]

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Rank by a random permutation of the tokens that entered the language model."""
        order = random_subset(tokens.total, tokens.total, self.seed, event.layer)
        rank = torch.empty(tokens.total)
        rank[order] = torch.arange(tokens.total, dtype=torch.float32)
        return rank.to(tokens.hidden.device)[tokens.origin]
