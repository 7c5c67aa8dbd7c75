"""FastV: after a few layers, keep what the last prompt token looks at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import DropOnce, LayerEvent, LayerScorer, LayerTokens, RowRequest


@register("fastv", stage="in_llm", paper="arXiv 2403.06764", source="pkunlp-icler/FastV")
@dataclass(frozen=True)
class FastV(DropOnce, LayerScorer):
    """Drop once, by the attention of the last prompt token, after a few layers.

    The paper speaks of the attention received from all tokens; its numbers, and every variant of the
    official code, come from the last row alone, which is what is used here.

    Paper: "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024.
    """

    def rows(self, event: LayerEvent) -> RowRequest:
        """Ask for the row of the layer before."""
        return RowRequest(event.layer - 1)

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Average the row over the heads."""
        return last_row_score(tokens)


def last_row_score(tokens: LayerTokens) -> Tensor:
    """Average the last token's attention to each candidate over the heads.

    Returns:
        float32 ``[V]``.

    Raises:
        ValueError: if the attention rows were not provided.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[0.1, 0.6, 0.3], [0.3, 0.2, 0.5]])
        >>> both = torch.arange(2)
        >>> tokens = LayerTokens(torch.zeros(3, 4), both, both, both * 0, 2, (2,), rows)
        >>> [round(value, 3) for value in last_row_score(tokens).tolist()]
        [0.2, 0.4]
    """
    if tokens.attention_rows is None:
        raise ValueError("attention_rows is missing; declare it in rows()")
    return tokens.attention_rows.float().mean(dim=0)[tokens.candidates]
