"""QuickPrefill: of each group of frames, the entries with the shortest keys stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.budget import shares
from mmfast.kv.base import CacheScorer
from mmfast.kv.entries import Entries, Retained
from mmfast.registry import register


@dataclass(frozen=True)
class VisualScorer(CacheScorer):
    """Base of methods that were made for frames: visual entries compete, text always stays.

    Attributes:
        keep: visual entries per head.
        entries: ``"visual"``; nothing else is possible.
    """

    entries: Literal["all", "visual"] = "visual"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.entries != "visual":
            raise ValueError(f"entries={self.entries!r} must be 'visual': this method says nothing about text")


@register("quickprefill", stage="cache", paper="arXiv 2505.16175", source="TIGER-AI-Lab/QuickVideo", vectors=True)
@dataclass(frozen=True)
class QuickPrefill(VisualScorer):
    """Keep the visual entries with the shortest keys, in each group of frames its share; all text stays.

    The keys of all heads of a layer count as one long key, so that all heads keep the same entries. The paper reads
    one group after the other, each against the shortened cache of those before; here the whole prompt has been read
    before any of it goes. An image is a group of its own.

    Paper: "QuickVideo: Real-Time Long Video Understanding with System Algorithm Co-Design".

    Attributes:
        keep: visual entries.
        group: frames of a group.
    """

    group: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1:
            raise ValueError(f"group={self.group!r} must be an int of at least 1: frames of a group")

    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return the negative norm of the keys of all heads together, ``[n]``."""
        return -entries.keys.float().square().sum(dim=(0, 2)).sqrt()

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Keep the best of each group."""
        stays = ~entries.visual
        places = entries.visual.nonzero().squeeze(-1)
        scores = self.scores(entries, kept)[places]
        group = self.groups(entries.media[places], entries.frame[places])
        sizes = group.bincount()
        quota = torch.tensor(shares(kept - int(stays.sum()), sizes.tolist()), device=places.device)
        order = scores.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[group[order]]
        stays[places] = rank < quota[group]
        return Retained(stays)

    def groups(self, media: Tensor, frame: Tensor) -> Tensor:
        """Number the groups.

        Args:
            media: int64 ``[v]``, image or video of each visual entry.
            frame: int64 ``[v]``, its frame.

        Returns:
            int64 ``[v]``.

        Example:
            >>> QuickPrefill(group=2).groups(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 1, 2, 3, 0])).tolist()
            [0, 0, 1, 1, 2]
        """
        pairs = torch.stack([media, frame.div(self.group, rounding_mode="floor")], dim=-1)
        found: Tensor = pairs.unique(dim=0, return_inverse=True)[1]
        return found
