"""AIM, its part inside the language model: rank tokens like pages and drop some in every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.budget import check_keep
from mmfast.registry import register
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.layers import LayerEvent, LayerRequest, LayerScorer, LayerTokens


@register("aim_prune", stage="in_llm", paper="arXiv 2412.03248", source="LaVi-Lab/AIM", vectors=True)
@dataclass(frozen=True)
class AIMPrune(LayerScorer):
    """Drop an equal number in each of several layers, by PageRank on a sharpened attention map, until none is left.

    A token matters if tokens that matter look at it. With the defaults a model of 28 layers loses an eighth of its
    visual tokens in each of the layers 15 to 22, as in the paper: 66.1 % on average, which is what ``keep`` says.
    Another ``keep`` moves the place where this begins; where that would be before the first layer, tokens go faster
    instead. The published setting for 32-layer Vicuna is ``keep=0.546875, span=8``. Unlike the official code, which
    only masks tokens and still computes them, dropped tokens leave the sequence, and do not vote any more.

    Every round reads the attention of all tokens in the layer: the costliest signal of the methods here.
    ``iterations=1`` ranks by plain received attention.

    Paper: "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning", ICCV 2025.

    Attributes:
        keep: visual tokens a layer reads on average; int = count per image, float = fraction.
        span: in how many layers all visual tokens go, as number (int) or share of the depth (float).
        iterations: rounds of PageRank.
        temperature: divides the logits of the attention.
        damping: share of importance that every token gets in each round, in [0, 1).
    """

    needs = frozenset({"attention"})

    keep: int | float = 18.5 / 28
    span: int | float = 8 / 28
    iterations: int = 5
    temperature: float = 0.1
    damping: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_keep(self.span, field="span")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be at least 1")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if not 0.0 <= self.damping < 1.0:
            raise ValueError(f"damping={self.damping} must lie in [0, 1)")

    def events(self, depth: int) -> list[LayerEvent]:
        """Return one event per layer but the first; those that drop nothing are left out by the counts."""
        return [LayerEvent(layer, layer - 1, depth) for layer in range(1, depth)]

    def notice(self, depth: int) -> str:
        """Say when ``keep`` is a fraction that cannot be reached."""
        if not isinstance(self.keep, float) or self.keep * depth >= 1.0:
            return ""
        return (
            f"keep={self.keep:g} as an average over the layers cannot be reached: the first of {depth} layers reads "
            f"every token, so the least, {1 / depth:.3f}, is what it comes to; drop before the LLM for less"
        )

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for the layer before."""
        return LayerRequest(event.layer - 1)

    def counts(self, total: int, depth: int, images: int = 1) -> list[int]:
        """Cut off instead of rounding, always from the full number of visual tokens."""
        share = self.keep if isinstance(self.keep, float) else min(1.0, self.keep * images / total)
        span = self.span if isinstance(self.span, int) else self.span * depth
        return [int(total * rate) for rate in falling_rates(share, max(1.0, span), depth)]

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Rank the tokens of the prompt, and return what concerns the candidates."""
        importance = page_rank(
            tokens.view(), iterations=self.iterations, temperature=self.temperature, damping=self.damping
        )
        return importance[tokens.candidates]


def page_rank(view: AttentionView, *, iterations: int = 5, temperature: float = 0.1, damping: float = 0.0) -> Tensor:
    """Let importance flow along the attention of each head: ``x <- x P (1 - damping) + damping / n``.

    Args:
        view: attention of one prompt.
        iterations: rounds.
        temperature: divides the logits.
        damping: share that is spread evenly in each round.

    Returns:
        float32 ``[n]``, the root of the mean square over the heads.

    Example:
        >>> view = AttentionView(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
        >>> page_rank(view, iterations=1)
        tensor([0.7500, 0.2500])
    """
    even = 1.0 / view.length
    flow = torch.full((view.heads, view.length), even, device=view.query.device)
    lse = view.row_lse(temperature=temperature)
    for _ in range(iterations):
        received = view.column_sums(flow, heads="each", temperature=temperature, lse=lse)
        flow = received * (1.0 - damping) + damping * even
    return flow.square().mean(dim=0).sqrt()


def falling_rates(keep: float, span: float, depth: int) -> list[float]:
    """Let the share of tokens that layers read fall from 1 to 0 in a straight line, averaging ``keep``.

    Args:
        keep: wanted average over all layers, in (0, 1].
        span: number of layers from 1 to 0, at least 1; fewer where the line would begin before layer 0.
        depth: number of layers.

    Returns:
        The shares read by the layers 1 to ``depth - 1``. Layer 0 reads everything, so the least average is
        ``1 / depth``.

    Example:
        >>> falling_rates(18.5 / 28, 8, 28)[13:23]
        [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    """

    def line(start: float, length: float) -> list[float]:
        return [min(1.0, max(0.0, 1.0 - (layer - start) / length)) for layer in range(depth)]

    steeper = sum(line(0.0, span)) > keep * depth
    low, high = (1.0, span) if steeper else (0.0, float(depth))
    for _ in range(100):
        middle = (low + high) / 2
        enough = sum(line(0.0, middle) if steeper else line(middle, span)) < keep * depth
        low, high = (middle, high) if enough else (low, middle)
    # Published settings begin at whole layers, and cutting off counts must not lose a token to the last bit.
    solved = round(high, 9)
    return line(0.0, solved)[1:] if steeper else line(solved, span)[1:]
