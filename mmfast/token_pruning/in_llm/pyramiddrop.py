"""PyramidDrop: drop visual tokens in several steps as the layers get deeper."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.in_llm.fastv import last_row_score
from mmfast.token_pruning.layers import LayerEvent, LayerRequest, LayerScorer, LayerTokens, Schedule


@register("pyramiddrop", stage="in_llm", paper="arXiv 2410.17247", source="Cooperx521/PyramidDrop", vectors=True)
@dataclass(frozen=True)
class PyramidDrop(Schedule, LayerScorer):
    """Drop before several layers, ranking by that layer's own attention of the last prompt token.

    With the defaults 1/2, 1/4 and 1/8 of the visual tokens are left from a quarter, a half and three
    quarters of the depth on (layers 8, 16, 24 of 32), as in the paper: 46.9 % on average, which is what
    ``keep`` says. The official code renumbers positions at each step (``positions="compact"``); here
    survivors keep their positions unless that is asked for.

    Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
    Reduction", CVPR 2025.
    """

    needs = frozenset({"attention"})

    keep: int | float | None = 0.46875

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for the row of the layer that is about to run."""
        return LayerRequest(event.layer, ahead=True, queries="last")

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Average the row over the heads."""
        return last_row_score(tokens)
