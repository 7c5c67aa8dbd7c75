"""PyramidDrop: drop visual tokens in several steps as the layers get deeper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mmfast.budget import (
    check_keep,
    geometric_for_average,
    geometric_fractions,
    resolve_layer,
    truncated_count,
)
from mmfast.registry import register
from mmfast.token_pruning.base import LayerEvent, LayerScorer, LayerTokens, RowRequest, check_choice
from mmfast.token_pruning.in_llm.fastv import last_row_score


@register("pyramiddrop", stage="in_llm", paper="arXiv 2410.17247", source="Cooperx521/PyramidDrop")
@dataclass(frozen=True)
class PyramidDrop(LayerScorer):
    """Drop before several layers, ranking by that layer's own attention of the last prompt token.

    With the defaults 1/2, 1/4 and 1/8 of the visual tokens are left from a quarter, a half and three
    quarters of the depth on (layers 8, 16, 24 of 32), as in the paper. Another ``keep`` changes the
    common factor between the steps. The official code renumbers positions at each step
    (``positions="compact"``); here survivors keep their positions unless that is asked for.

    Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
    Reduction", CVPR 2025.

    Attributes:
        keep: int = count per image, float = fraction; see ``budget``.
        layers: layers whose input is shortened, as indices (int) or relative depths (float).
        budget: whether ``keep`` is what is left after the last step (``"final"``) or the average
            over all layers (``"average"``, fractions only).
    """

    keep: int | float = 0.125
    layers: tuple[int | float, ...] = (0.25, 0.5, 0.75)
    budget: Literal["final", "average"] = "final"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_choice("budget", self.budget, ["final", "average"])
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("layers=() must name at least one layer, for example (0.25, 0.5, 0.75)")
        if self.budget == "average" and isinstance(self.keep, int):
            raise ValueError(
                f"keep={self.keep} with budget='average' must be a fraction (float in (0, 1]); counts name what is left"
            )

    def events(self, depth: int) -> list[LayerEvent]:
        """Spread the reduction over the layers."""
        layers = [resolve_layer(layer, depth) for layer in self.layers]
        if sorted(set(layers)) != layers:
            raise ValueError(
                f"layers={self.layers} means {layers} in a model of {depth} layers; they must be strictly ascending"
            )
        steps = len(layers)
        if isinstance(self.keep, int):
            return [LayerEvent(layer, self.keep, (i + 1) / steps) for i, layer in enumerate(layers)]
        if self.keep == 1.0:
            return []
        if self.budget == "average":
            fractions = geometric_for_average(self.keep, layers, depth)
        else:
            fractions = geometric_fractions(self.keep, steps)
        return [LayerEvent(layer, keep) for layer, keep in zip(layers, fractions, strict=True)]

    def rows(self, event: LayerEvent) -> RowRequest:
        """Ask for the row of the layer that is about to run."""
        return RowRequest(event.layer, ahead=True)

    def keep_count(self, event: LayerEvent, total: int) -> int:
        """Cut off instead of rounding, always from the full number of visual tokens."""
        if isinstance(event.keep, int):
            left = min(event.keep, total)
            return truncated_count((left / total) ** event.power, total) if event.power < 1 else left
        return truncated_count(event.keep, total)

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Average the row over the heads."""
        return last_row_score(tokens)
