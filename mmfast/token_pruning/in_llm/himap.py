"""HiMAP: first by what the question looks at, later by what visual tokens look at among themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.layers import LayerEvent, LayerRequest, LayerScorer, LayerTokens, Schedule


@register("himap", stage="in_llm", paper="arXiv 2503.13108", vectors=True)
@dataclass(frozen=True)
class HiMAP(Schedule, LayerScorer):
    """Drop in two steps: by attention from the question, then by attention among visual tokens.

    Before layer 2 (of 32) half of the visual tokens are left, those on which the text after them puts most
    attention in the layer before; before layer 8 an eighth, those on which the visual tokens put most.
    Rows are causal, so that early visual tokens are seen by more rows in the second step: as published.

    Paper: "Unraveling the Shift of Visual Information Flow in MLLMs: From Phased Interaction to Efficient
    Inference".
    """

    needs = frozenset({"attention"})

    keep: int | float | None = 0.25
    layers: tuple[int | float, ...] = (0.0625, 0.25)
    fractions: tuple[float, ...] = (0.5, 0.125)

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for the attention of the layer before."""
        return LayerRequest(event.layer - 1)

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Add up the head-averaged attention that the question or the visual tokens give."""
        rows = tokens.candidates if event.step else tokens.question
        return attention_from(tokens, rows)


def attention_from(tokens: LayerTokens, rows: Tensor) -> Tensor:
    """Add up, over some rows, the head-averaged attention to each candidate.

    Args:
        tokens: the prompt.
        rows: ``[R]`` int64 positions in ``hidden`` of the rows.

    Returns:
        float32 ``[V]``.

    Example:
        >>> from mmfast.token_pruning.attention import AttentionView
        >>> both = torch.arange(2)
        >>> view = AttentionView(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
        >>> tokens = LayerTokens(torch.zeros(4, 8), both, both, both * 0, 2, (2,), attention=view)
        >>> [round(value, 4) for value in attention_from(tokens, tokens.question).tolist()]
        [0.5833, 0.5833]
    """
    weights = torch.zeros(tokens.hidden.shape[0], device=tokens.hidden.device)
    weights[rows] = 1.0
    return tokens.view().column_sums(weights)[tokens.candidates]
