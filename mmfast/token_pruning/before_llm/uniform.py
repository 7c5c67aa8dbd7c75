"""Uniform dropping: every n-th token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Selector
from mmfast.tokens import VisualTokens


@register("uniform", stage="before_llm")
@dataclass(frozen=True)
class Uniform(Selector):
    """Keep evenly spaced tokens in raster order."""

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Return the evenly spaced subset."""
        return uniform_subset(len(tokens), kept).to(tokens.features.device)


def uniform_subset(total: int, kept: int) -> Tensor:
    """Return the middles of ``kept`` equal parts of ``0..total-1``: ``floor((2i+1) total / 2 kept)``.

    Returns:
        int64 ``[kept]``, strictly ascending for ``kept <= total``.

    Example:
        >>> uniform_subset(10, 3).tolist()
        [1, 5, 8]
    """
    return torch.div((2 * torch.arange(kept) + 1) * total, 2 * kept, rounding_mode="floor")
