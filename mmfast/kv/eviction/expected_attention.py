"""Expected attention: what tokens still to come will look at, judged by the queries so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.kv.base import CacheScorer
from mmfast.kv.entries import Entries, rotate
from mmfast.kv.eviction.lagkv import check_sinks
from mmfast.registry import register


@register("expected_attention", stage="cache", paper="arXiv 2510.00636", source="NVIDIA/kvpress", vectors=True)
@dataclass(frozen=True)
class ExpectedAttention(CacheScorer):
    """Keep the entries that future queries are expected to attend to, times the norm of their values.

    The un-rotated queries of the prompt are taken for a normal distribution, which is rotated to the average of
    the positions to come; the expected attention weight then has a closed form. Positions to come count from the
    number of entries, as text does. No single question decides: all tokens of the prompt add to the statistics
    alike.

    Paper: "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution".

    Attributes:
        keep: entries per head, the sinks included.
        future: positions to come that are averaged over.
        sinks: entries at the start that always stay and whose queries do not count.
        covariance: whether the spread of the queries counts besides their mean.
        value_norm: whether to multiply by the norm of the values.
        epsilon: added to the expected attention before it is multiplied.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention", "rotation"})

    future: int = 512
    sinks: int = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sinks(self.sinks)
        if isinstance(self.future, bool) or not isinstance(self.future, int) or self.future < 1:
            raise ValueError(f"future={self.future!r} must be an int of at least 1: positions to come")
        if isinstance(self.epsilon, bool) or not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon={self.epsilon!r} must be a number of at least 0")

    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return the expected attention, weighted by the values, ``[G, n]``; the sinks are forced."""
        # At least one token has to be left to take the statistics from.
        sinks = min(self.sinks, len(entries) - 1)
        weights = entries.per_group(self.logits(entries, sinks).softmax(dim=-1))
        if self.value_norm:
            weights = (weights + self.epsilon) * entries.values[:, sinks:].float().norm(dim=-1)
        return torch.cat([weights.new_full((entries.heads, sinks), torch.inf), weights], dim=-1)

    def logits(self, entries: Entries, sinks: int) -> Tensor:
        """Return the logarithm of the expected unnormalised attention, float32 ``[H, n - sinks]``."""
        if entries.rotation is None:
            raise RuntimeError('a method that reads positions must name "rotation" in needs')
        query = entries.rotation.undo(entries.view.query)[:, sinks:]
        mean = query.mean(dim=1)
        total, device = len(entries), entries.keys.device
        # Rotations are linear in their cosines and sines, so these can be averaged.
        turns = entries.rotation.at(torch.arange(total, total + self.future, device=device))
        cos, sin = (table.float().mean(dim=0, keepdim=True) for table in turns)
        scaling = query.shape[-1] ** -0.5 if entries.view.scaling is None else entries.view.scaling
        # One stored head at a time: [H, n, d] in float32 would be larger than the cache.
        ahead = rotate(mean[:, None], cos, sin)[:, 0].unflatten(0, (entries.heads, -1))
        keys = entries.keys[:, sinks:]
        logits = torch.stack([key.float() @ own.T for key, own in zip(keys, ahead, strict=True)]) * scaling
        if self.covariance:
            centred = query - mean[:, None]
            spread = torch.einsum("hni,hnj->hij", centred, centred) / query.shape[1]
            spread = rotate(rotate(spread, cos, sin).mT, cos, sin).unflatten(0, (entries.heads, -1))
            quadratic = [
                torch.einsum("ni,rij,nj->nr", key.float(), own, key.float())
                for key, own in zip(keys, spread, strict=True)
            ]
            logits = logits + torch.stack(quadratic) * (scaling**2 / 2)
        return logits.mT.flatten(0, 1)
