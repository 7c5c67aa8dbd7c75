"""DivPrune: keep the tokens that are most different from each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Selector
from mmfast.tokens import VisualTokens

MATRIX_LIMIT = 4096
"""Up to here one float32 ``N x N`` matrix is the fastest way to the first pick; above, it is blocked."""
_BLOCK_ELEMENTS = 1 << 24


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
        >>> order = max_min_order(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), 2)
        >>> order.tolist()
        [2, 0]
    """
    unit = features.float()
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    total = unit.shape[0]
    if total <= MATRIX_LIMIT:
        similarity = unit @ unit.T
        similarity.fill_diagonal_(-torch.inf)
        nearest = similarity.amax(dim=0) if total > 1 else similarity.new_zeros(1)
    else:
        similarity = None
        nearest = _nearest_similarity(unit)
    picks = torch.empty(kept, dtype=torch.int64, device=unit.device)
    # Maximising the smallest distance is minimising the largest similarity.
    pick = nearest.argmin()
    picks[0] = pick
    largest = torch.full((total,), -torch.inf, device=unit.device)
    for step in range(1, kept):
        row = unit @ unit[pick] if similarity is None else similarity[pick]
        torch.maximum(largest, row, out=largest)
        largest[pick] = torch.inf
        pick = largest.argmin()
        picks[step] = pick
    return picks


def _nearest_similarity(unit: Tensor) -> Tensor:
    """Cosine similarity of each row to its nearest other row, in blocks of bounded size."""
    total = unit.shape[0]
    block = max(1, _BLOCK_ELEMENTS // total)
    nearest = torch.empty(total, device=unit.device)
    for start in range(0, total, block):
        rows = unit[start : start + block] @ unit.T
        local = torch.arange(rows.shape[0], device=unit.device)
        rows[local, local + start] = -torch.inf
        nearest[start : start + block] = rows.amax(dim=1)
    return nearest
