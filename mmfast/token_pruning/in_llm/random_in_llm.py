"""Random dropping inside the language model: the baseline for every in-LLM method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.before_llm.random import random_subset
from mmfast.token_pruning.layers import DropOnce, LayerEvent, LayerScorer, LayerTokens


@register("random_in_llm", stage="in_llm")
@dataclass(frozen=True)
class RandomInLLM(DropOnce, LayerScorer):
    """Keep a random subset of the visual tokens, from one layer on.

    Attributes:
        seed: seed of the draw; report at least three.
    """

    reads_question = False

    seed: int = 0

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Rank by a random permutation of the tokens that entered the language model."""
        order = random_subset(tokens.total, tokens.total, self.seed, event.layer)
        rank = torch.empty(tokens.total)
        rank[order] = torch.arange(tokens.total, dtype=torch.float32)
        return rank.to(tokens.hidden.device)[tokens.origin]
