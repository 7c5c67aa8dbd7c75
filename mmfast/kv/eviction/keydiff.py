"""KeyDiff: keys that differ from the average stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import CacheScorer
from mmfast.kv.entries import Entries
from mmfast.registry import register


@register("keydiff", stage="cache", paper="arXiv 2504.15364", source="NVIDIA/kvpress", vectors=True)
@dataclass(frozen=True)
class KeyDiff(CacheScorer):
    """Keep the entries whose keys point away from the mean direction of all keys of the head.

    Nothing but the keys is read.

    Paper: "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments".
    """

    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return the negative cosine of each key with the mean of the normalised keys, ``[G, n]``."""
        keys = entries.keys.float()
        mean = functional.normalize(keys, dim=-1).mean(dim=1, keepdim=True)
        return -functional.cosine_similarity(keys, mean, dim=-1)
