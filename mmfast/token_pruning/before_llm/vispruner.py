"""VisPruner: important tokens by attention, and diverse ones among the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Selector, VisionSignal
from mmfast.token_pruning.similarity import Cosines, highest_first
from mmfast.tokens import VisualTokens

_STEP = 8
"""Tokens dropped per round."""


@register("vispruner", stage="before_llm", paper="arXiv 2412.01818", source="Theia-4869/VisPruner", vectors=True)
@dataclass(frozen=True)
class VisPruner(Selector):
    """Keep the tokens of highest class attention, and of the others those unlike the rest.

    The others are thinned out in rounds: every second one is compared with those between, and the eight
    most similar go. The class token's attention and the features are those of the encoder.

    Paper: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
    ICCV 2025.

    Attributes:
        important: share of ``keep`` that is chosen by attention, in [0, 1]; 1 is FasterVLM.
    """

    needs = frozenset({"cls_attention", "patch_features"})

    keep: int | float = 64
    scope: Literal["global", "per_tile"] = "per_tile"
    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.important, bool) or not 0 <= self.important <= 1:
            raise ValueError(f"important={self.important!r} must lie in [0, 1]: the share of keep chosen by attention")

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the layer whose output the model uses as features."""
        return {"cls_attention": VisionSignal("cls_attention"), "patch_features": VisionSignal("patch_features")}

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Return the important tokens, then the diverse ones."""
        attention = tokens.signals["cls_attention"]
        return important_and_diverse(tokens.signals["patch_features"], attention, kept, int(kept * self.important))


def important_and_diverse(features: Tensor, attention: Tensor, kept: int, important: int) -> Tensor:
    """Choose tokens by attention first, then thin out the others.

    Args:
        features: ``[N, C]``, any float dtype.
        attention: ``[N]`` attention of the class token.
        kept: number of tokens, at most N.
        important: how many of them are chosen by attention.

    Returns:
        int64 ``[kept]``. Ties go to the token of higher attention, then to the lower index.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.2]])
        >>> important_and_diverse(features, torch.tensor([0.4, 0.3, 0.2, 0.1]), 2, 1).tolist()
        [0, 2]
    """
    order = highest_first(attention, attention.numel())
    wanted = kept - important
    if wanted == 0:
        return order[:important]
    rest = order[important:]
    cosines = Cosines(features)
    while rest.numel() > wanted:
        even, odd = rest[0::2], rest[1::2]
        nearest = cosines.nearest(even, odd)
        gone = min(_STEP, rest.numel() - wanted, even.numel())
        # The survivors stay in the order of their similarity: the next round pairs them up anew.
        rest = torch.cat([even[highest_first(nearest, even.numel())[gone:]], odd])
    return torch.cat([order[:important], rest])
