"""VTW: from one layer on, no visual token at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfast.budget import check_keep, resolve_layer
from mmfast.registry import register
from mmfast.token_pruning.calibrating import Bench
from mmfast.token_pruning.layers import LayerDropper, LayerEvent, LayerTokens

_FIRST = 5 / 32
"""Relative depth at which calibration begins to look: the first layers are never dispensable."""


@register("vtw", stage="in_llm", paper="arXiv 2405.05803", source="lzhxmu/VTW")
@dataclass(frozen=True)
class VTW(LayerDropper):
    """Drop all visual tokens at one layer, when the text has taken up what it needs.

    ``keep`` is the average over the layers, so it says after which share of them the tokens go (rounded to whole
    layers); ``layer`` says it directly. Published: layer 15 or 16 of 32, 20 of 40. Good for short answers, bad
    for captions: later tokens of the answer have nothing to look at.

    Calibrate with :func:`mmfast.calibrate`: the first layer is taken from which on the tokens can be missed without
    the next token's distribution moving by more than ``tolerance``.

    Paper: "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference", AAAI 2025.

    Attributes:
        keep: visual tokens a layer reads on average; int = count per image, float = fraction.
        layer: first layer without visual tokens, as index (int) or relative depth (float); overrides ``keep``.
        tolerance: largest Kullback-Leibler divergence with which calibration accepts a layer.
    """

    reads_question = False

    keep: int | float = 0.5
    layer: int | float | None = None
    tolerance: float = 0.0005

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        if not self.tolerance >= 0.0:
            raise ValueError(f"tolerance={self.tolerance} must be at least 0")

    def events(self, depth: int) -> list[LayerEvent]:
        """Return one event per layer but the first; all but one are left out by the counts.

        Raises:
            ValueError: if ``layer`` does not fit the model.
        """
        if self.layer is not None:
            resolve_layer(self.layer, depth)
        return [LayerEvent(layer, layer - 1, depth) for layer in range(1, depth)]

    def counts(self, total: int, depth: int, images: int = 1) -> list[int]:
        """Return all tokens before the layer and none from it on."""
        first = self.first_without(total, depth, images)
        return [total if layer < first else 0 for layer in range(1, depth)]

    def first_without(self, total: int, depth: int, images: int = 1) -> int:
        """Return the first layer without visual tokens; ``depth`` if there is none.

        Example:
            >>> VTW(keep=0.5).first_without(576, 32), VTW(keep=64).first_without(576, 32)
            (16, 4)
        """
        if self.layer is not None:
            return resolve_layer(self.layer, depth)
        share = self.keep if isinstance(self.keep, float) else self.keep * images / total
        return min(max(1, round(share * depth)), depth)

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor:
        """Keep none."""
        return torch.empty(0, dtype=torch.int64, device=tokens.candidates.device)

    def calibrated(self, bench: Bench, keep: int | float | None) -> VTW:
        """Find the first layer from which on the visual tokens can be missed.

        Raises:
            ValueError: if ``keep`` is given, which is what calibration finds.
        """
        if keep is not None:
            raise ValueError(
                f"keep={keep}: the calibration of {self.name!r} finds it from tolerance={self.tolerance}; leave it out"
            )
        for layer in range(max(1, round(_FIRST * bench.shape.layers)), bench.shape.layers):
            candidate = replace(self, layer=layer)
            if bench.divergence(candidate) <= self.tolerance:
                return candidate
        return replace(self, layer=None, keep=1.0)
