"""AdaKV: the heads of a layer compete for one budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmfast.kv.base import top_mask
from mmfast.kv.entries import Entries, Retained
from mmfast.kv.eviction.h2o import check_share
from mmfast.kv.eviction.pyramidkv import ScorerUser
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, check_choice

_LOWEST = torch.finfo(torch.float32).min


@register("adakv", stage="cache", paper="arXiv 2407.11550", source="Zefan-Cai/KVCache-Factory", vectors=True)
@dataclass(frozen=True)
class AdaKV(ScorerUser):
    """Let the scores of all heads of a layer compete, so that heads whose attention is spread out keep more.

    What the scorer forces (its window) stays in every head and does not compete. With a scorer that shares out
    the budget over the layers, such as ``"pyramidkv"``, this one shares out what a layer gets.

    Paper: "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference".

    Attributes:
        keep: entries per head, on average over the heads.
        scorer: the method that scores, by name or with options such as ``"snapkv(window=16)"``; its budget is
            given here.
        alpha: share of the budget that is the same for all heads.
        floor: ``"blend"`` lets every head have ``alpha`` times the average plus ``1 - alpha`` times what it wins;
            ``"minimum"`` gives each head its own best ``alpha`` times the average first, forced entries
            included, and lets all others compete for what is left.
        normalize: weigh the scores of a head by the share of its best ``keep`` in the sum of all, before
            they compete; with ``floor="blend"`` only.
        compat: ``"official"`` rounds each head for itself, so that the sum may be off by some entries.
    """

    ragged: ClassVar[bool] = True

    alpha: float = 0.2
    floor: Literal["blend", "minimum"] = "blend"
    normalize: bool = False
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("alpha", self.alpha)
        check_choice("floor", self.floor, ["blend", "minimum"])
        check_choice("normalize", self.normalize, [True, False])
        check_choice("compat", self.compat, [None, "official"])
        if self.floor == "minimum" and (self.normalize or self.compat):
            raise ValueError("floor='minimum' takes scores as they are: leave out normalize and compat")

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Keep the entries of highest score in each head."""
        scores = self.scores(entries, kept).expand(entries.heads, -1)
        return Retained(ragged_mask(scores, self.head_counts(scores, kept)))

    def head_counts(self, scores: Tensor, kept: int) -> Tensor:
        """Say how many entries each head keeps.

        Args:
            scores: float32 ``[G, n]``; plus infinity forces an entry.
            kept: average over the heads.

        Returns:
            int64 ``[G]``, forced entries included.
        """
        forced = scores == torch.inf
        if self.floor == "minimum":
            first = scores.masked_fill(top_mask(scores, int(self.alpha * kept)), torch.inf)
            return top_mask(first.flatten(), scores.shape[0] * kept).view_as(scores).sum(dim=-1)
        stays = forced.sum(dim=-1).clamp_max(kept)
        # An entry that is forced is no candidate, and comes after those whose score is no number.
        free = scores.clamp_min(_LOWEST).masked_fill(forced, -torch.inf)
        if self.normalize:
            free = free * concentration(free, kept - stays)
        total = int((kept - stays).sum())
        won = top_mask(free.flatten(), total).view_as(scores).sum(dim=-1)
        if self.compat == "official":
            floors = [int((kept - count) * self.alpha) for count in stays.tolist()]
            return stays + torch.round(won * (1 - self.alpha) + torch.tensor(floors, device=won.device)).long()
        wanted = won.double() * (1 - self.alpha) + (kept - stays).double() * self.alpha
        return stays + torch.tensor(rounded(wanted.tolist(), total), device=stays.device)


def concentration(scores: Tensor, counts: Tensor) -> Tensor:
    """Return how much of the sum of each row its highest scores are; infinite ones are left out.

    Args:
        scores: ``[G, n]``.
        counts: int64 ``[G]``, how many of each row.

    Returns:
        float32 ``[G, 1]``.

    Example:
        >>> concentration(torch.tensor([[3.0, 1.0], [2.0, 2.0]]), torch.tensor([1, 1])).tolist()
        [[0.75], [0.5]]
    """
    counted = scores.masked_fill((scores <= _LOWEST) | scores.isinf(), 0.0)
    top = counted.masked_fill(~ragged_mask(scores, counts), 0.0).sum(dim=-1, keepdim=True)
    return torch.nan_to_num(top / counted.sum(dim=-1, keepdim=True), nan=1.0, posinf=1.0, neginf=1.0)


def ragged_mask(scores: Tensor, counts: Tensor) -> Tensor:
    """Mark the highest scores of each row; ties go to the lower index.

    Args:
        scores: ``[G, n]``.
        counts: int64 ``[G]``, how many of each row.

    Returns:
        bool ``[G, n]``.

    Example:
        >>> ragged_mask(torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]]), torch.tensor([1, 2])).tolist()
        [[False, True, False], [True, True, False]]
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.arange(scores.shape[-1], device=scores.device) < counts[:, None]
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


def rounded(wanted: Sequence[float], total: int) -> list[int]:
    """Round numbers whose sum is ``total`` so that it stays; what is left goes to the largest remainders.

    Example:
        >>> rounded([1.5, 2.25, 0.25], 4)
        [2, 2, 0]
    """
    parts = [int(value) for value in wanted]
    order = sorted(range(len(parts)), key=lambda index: (parts[index] - wanted[index], index))
    for index in order[: total - sum(parts)]:
        parts[index] += 1
    return parts
