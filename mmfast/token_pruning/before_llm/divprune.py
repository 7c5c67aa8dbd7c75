"""DivPrune: keep the tokens that are most different from each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmfast.kernels.max_min_select import max_min_select
from mmfast.kernels.rows import MATRIX_LIMIT as MATRIX_LIMIT
from mmfast.registry import register
from mmfast.token_pruning.base import Selector
from mmfast.tokens import VisualTokens


@register("divprune", stage="before_llm", paper="arXiv 2503.02175", source="vbdi/divprune", vectors=True)
@dataclass(frozen=True)
class DivPrune(Selector):
    """Keep the most diverse tokens (max-min cosine distance).

    The first pick is the token whose nearest neighbour is farthest; each next one is the token
    farthest from all picks so far. Distances are computed in float32. Unlike the official code a
    token is never picked twice, so exactly ``keep`` tokens survive even among duplicates.

    Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025.
    """

    keep: int | float = 0.098

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Return the picks in the order in which they were made."""
        return max_min_order(tokens.features, kept)


def max_min_order(features: Tensor, kept: int) -> Tensor:
    """Pick ``kept`` rows greedily so that the smallest cosine distance between picks is large.

    Args:
        features: ``[N, D]``, any float dtype.
        kept: number of picks, at most N.

    Returns:
        int64 ``[kept]`` in order of picking. Ties go to the lower index.

    Example:
        >>> import torch
        >>> order = max_min_order(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), 2)
        >>> order.tolist()
        [2, 0]
    """
    return max_min_select(features[None], kept, matrix_limit=MATRIX_LIMIT)[0]
