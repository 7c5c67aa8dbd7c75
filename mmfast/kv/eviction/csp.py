"""CSP: attention within and across text and images, each with a budget of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import Evictor, top_mask
from mmfast.kv.entries import Entries, Retained
from mmfast.kv.eviction.h2o import check_share, recent_count
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, check_choice

_LOGITS = 1 << 22
"""Largest number of logits held at once (16 MiB)."""


@register("csp", stage="cache", paper="arXiv 2412.04652", source="TerryPei/CSP", vectors=True)
@dataclass(frozen=True)
class CSP(Evictor):
    """Keep what the newest tokens attend to within their own modality, and a share of what they do across.

    Text that attends to text and images that attend to images count as one list, text that attends to images
    and images that attend to text as the other. An entry that both choose is kept once; its place, and what
    rounding leaves, goes to the next of the first list. Query heads that share a key/value head are averaged.

    Paper: "Cross-Self KV Cache Pruning for Efficient Vision-Language Inference".

    Attributes:
        recent: share of ``keep`` that are the newest entries; their attention counts.
        cross: share of the others that are chosen across modalities.
        stretch: the newest entries that stay are this many times those whose attention counts.
        compat: ``"official"`` counts an entry that both lists choose twice in the attention (a bias of log 2;
            the place of the second copy is filled but never read), and leaves empty what rounding leaves.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True

    recent: float = 0.5
    cross: float = 0.1
    stretch: float = 1.0
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("recent", self.recent)
        check_share("cross", self.cross)
        check_choice("compat", self.compat, [None, "official"])
        if isinstance(self.stretch, bool) or not isinstance(self.stretch, int | float) or not 0 < self.stretch < 1e6:
            raise ValueError(f"stretch={self.stretch!r} must be above 0: how many times the newest entries stay")

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Choose by both lists."""
        rows = recent_count(self.recent, kept)
        last = self.last_count(rows, kept)
        own, other = self.scores(entries, rows, last)
        by_own, by_other = self.lists(own, other, kept - last)
        first, second = by_own | by_other, by_own & by_other
        # Every head is filled up to the same number, so what both lists chose makes room for others.
        wanted = kept - last if self.compat is None else sum(self.list_counts(kept - last))
        filled = top_mask(own.masked_fill(first, torch.inf), wanted)
        mask = functional.pad(filled, (0, last), value=True)
        if self.compat is None:
            return Retained(mask)
        bias = torch.zeros_like(own).masked_fill(second, math.log(2)).masked_fill(filled & ~first, -torch.inf)
        return Retained(mask, bias=functional.pad(bias, (0, last)))

    def last_count(self, rows: int, kept: int) -> int:
        """Say how many newest entries stay, where the attention of ``rows`` counts and ``kept`` stay in all."""
        return min(int(rows * self.stretch), kept)

    def scores(self, entries: Entries, rows: int, last: int) -> tuple[Tensor, Tensor]:
        """Add up what the newest tokens give to the entries before those that stay anyway.

        Each row is a softmax with one more logit, zero, so that a row that likes nothing gives little.

        Args:
            entries: the entries.
            rows: how many newest tokens count; one at least.
            last: how many newest entries stay.

        Returns:
            within and across modalities, float32 ``[G, n - last]`` each, finite.
        """
        length, view = len(entries), entries.view
        visual = entries.visual[: length - last]
        places = torch.arange(length - max(1, rows), length, device=visual.device)
        if view.silent is not None:
            places = places[~view.silent[places]]
        own = torch.zeros(view.heads, length - last, device=visual.device)
        other = torch.zeros_like(own)
        for part in places.split(max(1, _LOGITS // (view.heads * view.key.shape[1]))):
            given = functional.pad(view.logits(part), (1, 0)).softmax(dim=-1)[..., 1 + view.past :]
            given = given[..., : length - last]
            same = entries.visual[part][:, None] == visual
            own += (given * same).sum(dim=1)
            other += (given * ~same).sum(dim=1)
        return torch.nan_to_num(entries.per_group(own)), torch.nan_to_num(entries.per_group(other))

    def list_counts(self, count: int) -> tuple[int, int]:
        """Say how many entries each list chooses where ``count`` are to be chosen.

        Example:
            >>> CSP(cross=0.1).list_counts(18)
            (16, 1)
        """
        return int(count * (1 - self.cross)), int(count * self.cross)

    def lists(self, own: Tensor, other: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Mark what each list chooses.

        Args:
            own: ``[G, m]`` scores within modalities.
            other: ``[G, m]`` scores across.
            count: how many in all.

        Returns:
            bool ``[G, m]`` each; an entry may be in both.
        """
        within, across = self.list_counts(count)
        return top_mask(own, within), top_mask(other, across)
