"""SCOPE: cover all tokens by similar ones, and prefer what the class token looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mmfast.kernels.greedy_cover import Combine, greedy_cover_cosine
from mmfast.registry import register
from mmfast.token_pruning import similarity
from mmfast.token_pruning.base import Selector, VisionSignal, check_choice
from mmfast.tokens import VisualTokens


@register("scope", stage="before_llm", paper="arXiv 2510.24214", source="kinredon/SCOPE", vectors=True)
@dataclass(frozen=True)
class Scope(Selector):
    """Pick greedily the token that adds most to the coverage of all tokens, weighted with attention.

    A token is covered as far as the most similar pick is similar to it. Ties go to the lower index.
    The class token's attention and the features are those of the encoder.

    Paper: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs", NeurIPS 2025.

    Attributes:
        alpha: exponent of the attention, at least 0.
        combine: ``"multi"`` multiplies gain and attention, ``"add"`` adds them.
    """

    needs = frozenset({"cls_attention", "patch_features"})

    keep: int | float = 64
    scope: Literal["global", "per_tile"] = "per_tile"
    alpha: float = 1.0
    combine: Combine = "multi"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("combine", self.combine, ["multi", "add"])
        if isinstance(self.alpha, bool) or not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha!r} must be a number of at least 0: the exponent of the attention")

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the layer whose output the model uses as features; heads are added up."""
        return {
            "cls_attention": VisionSignal("cls_attention", heads="sum"),
            "patch_features": VisionSignal("patch_features"),
        }

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Return the picks in the order in which they were made."""
        saliency = tokens.signals["cls_attention"].float() ** self.alpha
        return coverage_order(tokens.signals["patch_features"], saliency, kept, self.combine)


def coverage_order(features: Tensor, saliency: Tensor, kept: int, combine: Combine = "multi") -> Tensor:
    """Pick ``kept`` rows greedily by the coverage they add, weighted with their saliency.

    Args:
        features: ``[N, C]``, any float dtype.
        saliency: float32 ``[N]``, not negative.
        kept: number of picks, at most N.
        combine: as of :class:`Scope`.

    Returns:
        int64 ``[kept]`` in order of picking. Ties go to the lower index.

    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> coverage_order(features, torch.ones(3), 2).tolist()
        [1, 2]
    """
    picks = greedy_cover_cosine(
        features[None], kept, saliency=saliency[None], combine=combine, matrix_limit=similarity.MATRIX_LIMIT
    )
    return picks[0]
