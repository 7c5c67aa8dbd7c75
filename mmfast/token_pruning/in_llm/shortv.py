"""ShortV: in layers that do little with them, visual tokens stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mmfast.budget import check_keep
from mmfast.registry import register
from mmfast.token_pruning.calibrating import Bench
from mmfast.token_pruning.layers import LayerBypass, LayerTokens, Route

PUBLISHED: dict[str, tuple[int, ...]] = {
    "llava-1.5-7b": (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19),
    "llava-next-7b": (31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2),
    "llava-1.5-13b": (
        *(39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31),
        *(2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17),
    ),
    "llava-next-13b": (
        *(39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2),
        *(28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17),
    ),
}
"""Layers of the published models, the most replaceable first."""


@register("shortv", stage="in_llm", paper="arXiv 2504.00502", source="icip-cas/ShortV")
@dataclass(frozen=True)
class ShortV(LayerBypass):
    """Freeze the visual tokens in some layers: text still attends to them, they themselves do not change.

    A frozen layer makes keys and values of all tokens, but queries, attention and feed-forward part of the text
    alone. No token is dropped and the cache keeps its size.

    ``keep`` is the share of the layers in which visual tokens take part (rounded to whole layers); published are
    13 of 32. Which layers freeze first is what ``order`` says. Without one, the deeper half of the layers freezes
    from the last one up, then the others from the first one down, which is about what the published orders have in
    common; :func:`mmfast.calibrate` measures it for a model.

    Paper: "ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens in Ineffective Layers",
    ICCV 2025.

    Attributes:
        keep: visual tokens that take part in a layer on average; int = count per image, float = fraction.
        order: layers from the most to the least replaceable, or the name of a published model:
            ``"llava-1.5-7b"``, ``"llava-next-7b"``, ``"llava-1.5-13b"``, ``"llava-next-13b"``. Where more layers
            must freeze than it names, the others follow as they would without it.
    """

    bypass = "freeze"

    keep: int | float = 13 / 32
    order: str | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        if isinstance(self.order, str):
            if self.order not in PUBLISHED:
                raise ValueError(f"order={self.order!r} must be one of {', '.join(map(repr, PUBLISHED))}, or layers")
        elif self.order is not None:
            object.__setattr__(self, "order", tuple(self.order))
            if len(set(self.order)) != len(self.order) or any(layer < 0 for layer in self.order):
                raise ValueError(f"order={self.order} must name different layers, the first being 0")

    def frozen(self, total: int, depth: int, images: int = 1) -> list[int]:
        """Return the layers in which ``total`` visual tokens are frozen, ascending.

        Raises:
            ValueError: if ``order`` names a layer that the model does not have.

        Example:
            >>> ShortV(keep=0.25).frozen(576, 8)
            [0, 1, 4, 5, 6, 7]
            >>> ShortV(keep=0.25, order=(2, 0)).frozen(576, 4)
            [0, 2, 3]
        """
        share = self.keep if isinstance(self.keep, float) else min(1.0, self.keep * images / max(1, total))
        return sorted(self._ranked(depth)[: depth - round(share * depth)])

    def _ranked(self, depth: int) -> list[int]:
        given = PUBLISHED[self.order] if isinstance(self.order, str) else self.order or ()
        if any(layer >= depth for layer in given):
            raise ValueError(f"order={self.order!r} names layer {max(given)}, but the model has {depth} layers")
        general = [*range(depth - 1, depth // 2 - 1, -1), *range(depth // 2)]
        return [*given, *(layer for layer in general if layer not in given)]

    def layers_of(self, depth: int) -> list[int]:
        """Return the frozen layers; for a count, which freezes more of them the more tokens there are, all."""
        return self.frozen(0, depth) if isinstance(self.keep, float) else sorted(self._ranked(depth))

    def route(self, tokens: LayerTokens, layer: int, depth: int) -> Route:
        """Let all visual tokens take part, or none."""
        count = tokens.candidates.numel()
        frozen = layer in self.frozen(tokens.total, depth, len(tokens.media_totals))
        return Route(torch.arange(0 if frozen else count, device=tokens.candidates.device))

    def keep_counts(self, visual: int, text: int, depth: int, images: int = 1) -> list[int]:
        """Return the text alone for frozen layers."""
        frozen = self.frozen(visual, depth, images)
        return [text if layer in frozen else text + visual for layer in range(depth)]

    def calibrated(self, bench: Bench, keep: int | float | None) -> ShortV:
        """Rank the layers by how far the next token's distribution moves when one of them alone is frozen."""
        alone = (bench.shape.layers - 1) / bench.shape.layers
        moved = [
            bench.divergence(replace(self, keep=alone, order=(layer,))) if bench.shape.layers > 1 else 0.0
            for layer in range(bench.shape.layers)
        ]
        order = tuple(sorted(range(bench.shape.layers), key=lambda layer: moved[layer]))
        return replace(self, order=order, keep=self.keep if keep is None else keep)
