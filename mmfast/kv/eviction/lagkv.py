"""LagKV: entries that stand out from what came next stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from mmfast.kv.base import CacheScorer
from mmfast.kv.entries import Entries
from mmfast.registry import register


@register("lagkv", stage="cache", paper="arXiv 2504.04704", source="NVIDIA/kvpress", vectors=True)
@dataclass(frozen=True)
class LagKV(CacheScorer):
    """Keep the entries that are most uneven when measured by the range of the next partition.

    After the sinks the prompt is cut into partitions of ``lag`` entries. Each channel of an entry is placed in
    the range which that channel has in the next partition; the spread over the channels, of keys and of values,
    ranks the entries of a partition. Every partition gives the same number of entries, give or take one. Sinks, the
    last partition and what remains after it always stay; of a prompt of fewer than two partitions, the sinks and
    the newest entries do. Where the budget cannot hold what always stays, partitions are made smaller.

    Paper: "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important".

    Attributes:
        keep: entries per head, the sinks and the end of the prompt included.
        sinks: entries at the start that always stay.
        lag: entries of a partition.
    """

    sinks: int = 4
    lag: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sinks(self.sinks)
        if isinstance(self.lag, bool) or not isinstance(self.lag, int) or self.lag < 1:
            raise ValueError(f"lag={self.lag!r} must be an int of at least 1: entries of a partition")

    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return ranks inside the partitions as fractions of 1, ``[G, n]``; what always stays gets 1."""
        total, sinks = len(entries), min(self.sinks, len(entries))
        scores = torch.ones(entries.heads, total, device=entries.keys.device)
        if total < sinks + 2 * self.lag:
            scores[:, sinks:] = torch.arange(total - sinks, device=scores.device) / max(1, total - sinks)
            return scores
        lag = self.fitting_lag(total, kept)
        end = total - (total - sinks) % lag
        spread = lag_spread(entries.keys[:, sinks:end], lag) + lag_spread(entries.values[:, sinks:end], lag)
        ranks = spread.argsort(dim=-1, stable=True).argsort(dim=-1) / lag
        scores[:, sinks : end - lag] = ranks.flatten(1)
        return scores

    def fitting_lag(self, total: int, kept: int) -> int:
        """Shrink the partitions where sinks, last partition and remainder would not fit.

        Example:
            >>> LagKV().fitting_lag(1000, 500), LagKV().fitting_lag(1000, 100)
            (128, 48)
        """
        always = self.sinks + self.lag + (total - self.sinks) % self.lag
        return self.lag if always <= kept or kept <= self.sinks else max(1, (kept - self.sinks) // 2)


def lag_spread(states: Tensor, lag: int) -> Tensor:
    """Compare each entry with the range of the next partition; the last one has no next.

    Args:
        states: ``[G, p * lag, d]`` keys or values of p partitions.
        lag: entries of a partition.

    Returns:
        float32 ``[G, p - 1, lag]``: the standard deviation over the channels, as a softmax over the partition.

    Example:
        >>> states = torch.tensor([[[0.5, 0.5], [0.0, 9.0], [0.0, 0.0], [1.0, 1.0]]])
        >>> [round(share, 3) for share in lag_spread(states, 2)[0, 0].tolist()]
        [0.002, 0.998]
    """
    parts = rearrange(states.float(), "g (p l) d -> g p l d", l=lag)
    lowest, highest = parts[:, 1:].amin(dim=2, keepdim=True), parts[:, 1:].amax(dim=2, keepdim=True)
    # A channel that never changes has no range to measure by.
    span = (highest - lowest).masked_fill(highest == lowest, 1.0)
    placed = (parts[:, :-1] - lowest) / span
    return torch.nan_to_num(placed.std(dim=-1)).softmax(dim=-1)


def check_sinks(sinks: object) -> None:
    """Refuse what is no number of entries.

    Raises:
        ValueError: naming the value.

    Example:
        >>> check_sinks(4)
    """
    if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"sinks={sinks!r} must be an int of at least 0: entries at the start that always stay")
