"""Attention given as a matrix, for cases in which only the probabilities are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.token_pruning.attention import AttentionView


@dataclass(frozen=True)
class DenseAttention(AttentionView):
    """A view whose rows are those of a matrix.

    Attributes:
        weights: ``[H, n, past + n]`` probabilities.
    """

    weights: Tensor | None = None

    @staticmethod
    def of(weights: Tensor, width: int = 1) -> DenseAttention:
        """Wrap ``[H, n, past + n]`` probabilities of heads of some width."""
        heads, queries, keys = weights.shape
        zeros = torch.zeros(heads, queries, width), torch.zeros(heads, keys, width)
        return DenseAttention(*zeros, weights=weights.float())

    @staticmethod
    def of_logits(logits: Tensor) -> DenseAttention:
        """Wrap ``[H, n, past + n]`` masked logits."""
        heads, queries, keys = logits.shape
        return DenseLogits(torch.zeros(heads, queries, 1), torch.zeros(heads, keys, 1), weights=logits.float())

    def logits(self, rows: Tensor, *, masked: bool = True) -> Tensor:
        """Return the logarithms of the probabilities."""
        assert self.weights is not None
        return self.weights[:, rows].log()


@dataclass(frozen=True)
class DenseLogits(DenseAttention):
    """A view whose logits are given."""

    def logits(self, rows: Tensor, *, masked: bool = True) -> Tensor:
        """Return them."""
        assert self.weights is not None
        return self.weights[:, rows]
