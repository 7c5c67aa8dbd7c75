"""TOPS, stage I: attention, diversity and coverage together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Selector, VisionSignal
from mmfast.token_pruning.similarity import Cosines, row_blocks
from mmfast.tokens import VisualTokens


@register("tops_stage1", stage="before_llm", paper="TOPS (preprint, 2026)")
@dataclass(frozen=True)
class TopsStage1(Selector):
    """Pick greedily by class attention, distance to the picks, and coverage of what is left.

    The three are divided by their means over the tokens not picked yet, as the algorithm of the paper
    does (its text speaks of min-max). For T tokens on average the paper keeps 2T here and drops more
    inside the language model.

    Paper: TOPS, preprint of 2026, Algorithm 1; no code is public.

    Attributes:
        alpha: weight of the distance, at least 0.
        lam: weight of the coverage, at least 0.
    """

    needs = frozenset({"cls_attention"})

    keep: int | float = 128
    alpha: float = 0.5
    lam: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("alpha", self.alpha), ("lam", self.lam)):
            if isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a number of at least 0: a weight beside the attention's 1")

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the layer whose output the model uses as features."""
        return {"cls_attention": VisionSignal("cls_attention")}

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Return the picks in the order in which they were made."""
        return balanced_order(tokens.features, tokens.signals["cls_attention"], kept, self.alpha, self.lam)


def balanced_order(features: Tensor, attention: Tensor, kept: int, alpha: float, lam: float) -> Tensor:
    """Pick ``kept`` rows greedily by attention, diversity and coverage, each relative to its mean.

    Args:
        features: ``[N, D]``, any float dtype.
        attention: ``[N]`` attention of the class token.
        kept: number of picks, at most N.
        alpha: weight of the diversity, 1 - similarity to the nearest pick.
        lam: weight of the coverage, what a row adds to the similarity of the rows left to their nearest pick.

    Returns:
        int64 ``[kept]`` in order of picking, the first being the highest attention. Ties go to the lower index.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> balanced_order(features, torch.tensor([0.5, 0.3, 0.3]), 2, 0.5, 0.5).tolist()
        [0, 2]
    """
    cosines = Cosines(features)
    saliency = attention.float()
    total = len(cosines)
    picks = torch.empty(kept, dtype=torch.int64, device=saliency.device)
    left = torch.ones(total, dtype=torch.bool, device=saliency.device)
    # Similarity to the nearest pick; infinite for picks, which need no more coverage.
    nearest = torch.full((total,), -torch.inf, device=saliency.device)
    coverage = torch.zeros(total, dtype=torch.float64, device=saliency.device)
    pick = saliency.argmax()
    for step in range(kept):
        picks[step] = pick
        left[pick] = False
        closer = torch.maximum(nearest, cosines.between(pick))
        closer[pick] = torch.inf
        # Only rows that came closer to a pick change the sums; float64 keeps the many small changes exact.
        changed = (closer > nearest).nonzero().squeeze(-1)
        for part in row_blocks(changed.numel(), total):
            rows = changed[part]
            similarity = cosines.between(rows)
            if step > 0:
                coverage -= (similarity - nearest[rows, None]).clamp_min_(0).sum(dim=0, dtype=torch.float64)
            coverage += (similarity - closer[rows, None]).clamp_min_(0).sum(dim=0, dtype=torch.float64)
        nearest = closer
        diversity = (1 - nearest).clamp_min(0)
        score = _relative(saliency, left) + alpha * _relative(diversity, left)
        score = score + lam * _relative(coverage.float(), left)
        pick = score.masked_fill(~left, -torch.inf).argmax()
    return picks


def _relative(values: Tensor, left: Tensor) -> Tensor:
    """Divide by the mean over the tokens that are left."""
    own = values.masked_fill(~left, 0)
    return own / (own.sum() / left.sum().clamp_min(1)).clamp_min(1e-12)
