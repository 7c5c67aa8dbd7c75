"""PruMerge+: PruMerge with evenly spaced tokens kept as well."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.before_llm.prumerge import PruMerge
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.token_pruning.similarity import highest_first, outlier_share


@register("prumerge_plus", stage="before_llm", paper="arXiv 2403.15388", source="42Shawn/LLaVA-PruMerge", vectors=True)
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """Keep outliers of the class token's attention and evenly spaced tokens, and merge as PruMerge.

    With ``keep=None`` about three evenly spaced tokens are added for each outlier. With a given
    ``keep`` a quarter is chosen by attention and the rest evenly among the others, which is the same
    mixture.

    Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025.

    Attributes:
        compat: ``"official"`` orders as the official code, the evenly spaced tokens after the outliers and
            the sum of the dropped ones last; and, like it, with ``keep=None`` never samples the last token.
    """

    def outliers(self, attention: Tensor) -> Tensor:
        """Choose by the rule of ``keep=None``, at least one token by attention."""
        total = attention.numel()
        picks = super().outliers(attention)
        stride = sample_stride(max(outlier_share(attention), 1 / total))
        samples = torch.arange(0, total if self.compat is None else total - 1, stride, device=picks.device)
        return torch.cat([picks, samples[~torch.isin(samples, picks)]])

    def choose(self, attention: Tensor, count: int) -> Tensor:
        """Choose a quarter of ``count`` by attention and the rest evenly spaced among the others."""
        picks = highest_first(attention, max(1, round(count / 4)))
        left = torch.ones_like(attention, dtype=torch.bool)
        left[picks] = False
        others = left.nonzero().squeeze(-1)
        return torch.cat([picks, others[uniform_subset(others.numel(), count - picks.numel()).to(others.device)]])


def sample_stride(share: float) -> int:
    """Return the distance of the evenly spaced tokens for a share of outliers: a third of 1 / share.

    Example:
        >>> sample_stride(0.05), sample_stride(0.9)
        (6, 1)
    """
    return max(1, int(1 / share) // 3)
