"""Key norms: short keys stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmfast.kv.base import CacheScorer
from mmfast.kv.entries import Entries
from mmfast.registry import register


@register("knorm", stage="cache", paper="arXiv 2406.11430", source="NVIDIA/kvpress", vectors=True)
@dataclass(frozen=True)
class KNorm(CacheScorer):
    """Keep the entries whose keys are shortest; these tend to get the most attention.

    Nothing but the keys is read, and rotary positions do not change their norms.

    Paper: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", EMNLP 2024.
    """

    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return the negative norm of each key, ``[G, n]``."""
        norms: Tensor = entries.keys.float().norm(dim=-1)
        return -norms
