"""Observed attention: what later tokens looked at, on average, stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.kv.base import CacheScorer
from mmfast.kv.entries import Entries
from mmfast.registry import register


@register("observed_attention", stage="cache", paper="arXiv 2306.14048", source="NVIDIA/kvpress", vectors=True)
@dataclass(frozen=True)
class ObservedAttention(CacheScorer):
    """Keep the entries that get most attention per token of the prompt that comes after them.

    The accumulated attention of H2O divided by the number of tokens that could look at the entry (itself and all
    later ones), so that early entries are not favoured. It reads every row of the attention once.

    Paper: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", NeurIPS 2023.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True

    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return the mean attention that each entry received, ``[G, n]``."""
        count, device = len(entries), entries.keys.device
        received = entries.view.column_sums(torch.ones(count, device=device), heads="each")
        return entries.per_group(received) / torch.arange(count, 0, -1, device=device)
