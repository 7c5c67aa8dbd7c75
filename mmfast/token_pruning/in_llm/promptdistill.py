"""PromptDistill: keep what the raw logits of the last prompt token point at, smoothed over neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from mmfast.registry import register
from mmfast.token_pruning.layers import LayerEvent, LayerRequest, LayerScorer, LayerTokens, Schedule


@register("promptdistill", stage="in_llm", paper="arXiv 2503.23274", source="declare-lab/PromptDistill", vectors=True)
@dataclass(frozen=True)
class PromptDistill(Schedule, LayerScorer):
    """Drop after a layer in the middle, by the logits of the last prompt token before the softmax.

    Logits are averaged over the heads and over five neighbours in the prompt. Made for long texts; here only
    visual tokens are candidates, and the text stays. The default layer is that of the paper, 13 of 32.

    Paper: "PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient Large
    Language Model Inference".

    Attributes:
        pooling: average each logit with its neighbours, two to either side; zeros count beyond the ends.
        truncated_steps: for how many steps, counted from the first, the caches of all layers before it are cut
            to its survivors as well; -1 = all.
    """

    needs = frozenset({"attention"})

    keep: int | float | None = 0.578125
    layers: tuple[int | float, ...] = (0.4375,)
    fractions: tuple[float, ...] = (0.25,)
    pooling: bool = True
    truncated_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.truncated_steps < -1:
            raise ValueError(f"truncated_steps={self.truncated_steps} must be a number of steps, or -1 for all")

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for queries and keys of the layer before."""
        return LayerRequest(event.layer - 1, queries="last")

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Pool the averaged logits of the last prompt token."""
        view, end = tokens.view(), tokens.last_token
        row = torch.tensor([end], device=tokens.hidden.device)
        logits = view.logits(row, masked=False)[:, 0, view.past :].mean(dim=0)
        return smoothed(logits, end, pooling=self.pooling)[tokens.candidates]

    def truncations(self, depth: int) -> list[tuple[int, int, int]]:
        """Cut the caches of all layers before the chosen steps."""
        chosen = [
            event for event in self.events(depth) if self.truncated_steps == -1 or event.step < self.truncated_steps
        ]
        return [(event.layer, 0, event.layer) for event in chosen]


def smoothed(logits: Tensor, end: int, *, pooling: bool) -> Tensor:
    """Blank the logits from the end of the prompt on and average each with its neighbours.

    As in the official code the blanks are zeros, which compete with negative logits at the edge.

    Args:
        logits: ``[n]`` float32.
        end: place of the last prompt token.
        pooling: whether to average.

    Returns:
        float32 ``[n]``.

    Example:
        >>> smoothed(torch.tensor([5.0, 0.0, 0.0, 9.0]), 3, pooling=True).tolist()
        [1.0, 1.0, 1.0, 0.0]
    """
    blank = logits.clone()
    blank[end:] = 0.0
    return avg_pool1d(blank[None], 5, stride=1, padding=2)[0] if pooling else blank
