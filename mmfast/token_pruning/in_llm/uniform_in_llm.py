"""Uniform dropping inside the language model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.token_pruning.layers import DropOnce, LayerEvent, LayerTokens


@register("uniform_in_llm", stage="in_llm")
@dataclass(frozen=True)
class UniformInLLM(DropOnce):
    """Keep evenly spaced visual tokens, from one layer on."""

    reads_question = False

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor:
        """Return evenly spaced candidates."""
        return uniform_subset(tokens.candidates.numel(), kept or 1).to(tokens.candidates.device)
