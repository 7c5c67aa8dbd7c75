"""FastV: after a few layers, keep what the last prompt token looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.layers import DropOnce, LayerEvent, LayerRequest, LayerScorer, LayerTokens


@register("fastv", stage="in_llm", paper="arXiv 2403.06764", source="pkunlp-icler/FastV", vectors=True)
@dataclass(frozen=True)
class FastV(DropOnce, LayerScorer):
    """Drop once, by the attention of the last prompt token, after a few layers.

    The paper speaks of the attention received from all tokens; its numbers, and every variant of the
    official code, come from the last row alone, which is what is used here.

    Paper: "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024.
    """

    needs = frozenset({"attention"})

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for the row of the layer before."""
        return LayerRequest(event.layer - 1, queries="last")

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Average the row over the heads."""
        return last_row_score(tokens)


def last_row_score(tokens: LayerTokens) -> Tensor:
    """Average the last prompt token's attention to each candidate over the heads.

    Returns:
        float32 ``[V]``.

    Raises:
        ValueError: if attention was not asked for.

    Example:
        >>> from mmfast.token_pruning.attention import AttentionView
        >>> both = torch.arange(2)
        >>> view = AttentionView(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
        >>> last_row_score(LayerTokens(torch.zeros(4, 8), both, both, both * 0, 2, (2,), attention=view)).tolist()
        [0.25, 0.25]
    """
    row = torch.tensor([tokens.last_token], device=tokens.hidden.device)
    return tokens.view().rows(row)[:, 0].mean(dim=0)[tokens.candidates]
