"""Averages over time and over space, as in RED-VILLM: one token per place and one per frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.budget import shares
from mmfast.registry import register
from mmfast.token_pruning.base import Merger, VisionSignal
from mmfast.token_pruning.similarity import frame_places, merged_keep, segment_sums
from mmfast.tokens import Keep, VisualTokens


@register("temporal_mean", stage="before_llm", paper="arXiv 2404.11865")
@dataclass(frozen=True)
class TemporalMean(Merger):
    """Average each place over all frames, and each frame over all its places.

    A video of T frames of P tokens becomes T + P tokens, averaged before the projector where that works token by
    token. With a larger budget places are averaged over shorter stretches of the video, with a smaller one
    neighbouring places and frames are averaged together. Each average stands at the middle of what it was made of,
    or at the nearest free place. What the paper trains on top is not needed to use it.

    Paper: "From Image to Video, what do we need in multimodal LLMs?".

    Attributes:
        keep: what survives; None is one token per place and one per frame.
    """

    needs = frozenset({"patch_features"})
    adaptive: ClassVar[bool] = True

    keep: int | float | None = None

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for what the projector would read."""
        return {"patch_features": VisionSignal("patch_features")}

    def own_count(self, tokens: VisualTokens) -> int:
        """Count the frames, and the places of the largest of them."""
        sizes = [places.numel() for places in frame_places(tokens.layout)]
        return len(sizes) + max(sizes)

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Average over time and over space."""
        features, space = self.material(tokens)
        frames = frame_places(tokens.layout)
        device, sizes = features.device, [places.numel() for places in frames]
        temporal, spatial = split_budget(len(frames), max(sizes), kept)
        order, lengths = torch.cat(frames), torch.tensor(sizes)
        number, cell, stretch = (torch.empty(len(tokens), dtype=torch.int64) for _ in range(3))
        number[order] = torch.arange(len(frames)).repeat_interleave(lengths)
        cell[order] = spatial_cells(sizes, spatial)
        stretch[order] = (torch.arange(len(frames)) * temporal // len(frames)).repeat_interleave(lengths)
        groups = [(group, count) for group, count in ((cell, spatial), (stretch, temporal)) if count]
        sums = torch.cat([segment_sums(features, group.to(device), count) for group, count in groups])
        members = torch.cat([torch.bincount(group, minlength=count) for group, count in groups]).to(device)
        slots = free_slots(torch.cat([middles(group, number) for group, _ in groups]), spatial, len(tokens))
        source = groups[0][0]
        # Where an average stands, its slot is what it came from.
        source[slots] = torch.arange(kept)
        means = (sums / members[:, None]).to(features.dtype)
        return merged_keep(slots.to(device), means, members.float(), source.to(device), space)


def split_budget(frames: int, places: int, kept: int) -> tuple[int, int]:
    """Say how many of ``kept`` tokens are averages over space, and how many are averages over time.

    Example:
        >>> split_budget(8, 196, 204), split_budget(8, 196, 500), split_budget(8, 196, 102)
        ((8, 196), (8, 492), (4, 98))
    """
    if kept >= frames + places:
        return frames, kept - frames
    first, second = shares(kept, [frames, places])
    return first, second


def spatial_cells(sizes: Sequence[int], cells: int) -> Tensor:
    """Say which average over time each token goes into.

    With fewer cells than places, neighbours in raster order share one; with more, places are cut into several
    stretches of time, some of them into one more than the others.

    Args:
        sizes: tokens of each frame.
        cells: number of averages, at most the number of tokens.

    Returns:
        int64 ``[sum(sizes)]``, frame by frame.

    Example:
        >>> spatial_cells([2, 2], 2).tolist(), spatial_cells([2, 2], 1).tolist(), spatial_cells([2, 2], 3).tolist()
        ([0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 2])
    """
    place = torch.cat([torch.arange(size) for size in sizes])
    places = max(sizes)
    if cells <= places:
        return place * cells // places
    seen, turns = torch.zeros(places, dtype=torch.int64), []
    for size in sizes:
        turns.append(seen[:size].clone())
        seen[:size] += 1
    # Cuts are spread evenly over the chances for one, so that no place gets more parts than it has tokens.
    chances = (seen - 1).cumsum(dim=0)
    cuts = (chances * (cells - places) // chances[-1]).diff(prepend=torch.zeros(1, dtype=torch.int64))
    parts = 1 + cuts
    return (parts.cumsum(dim=0) - parts)[place] + torch.cat(turns) * parts[place] // seen[place]


def middles(group: Tensor, frame: Tensor) -> Tensor:
    """Find the token in the middle of each group: its middle frame, and there its middle place.

    Args:
        group: int64 ``[N]`` in ``0..G-1``, none of them empty.
        frame: int64 ``[N]``.

    Returns:
        int64 ``[G]``.

    Example:
        >>> middles(torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 2])).tolist()
        [1, 4]
    """
    own = torch.arange(group.numel())
    order = own[(group * (int(frame.max()) + 1) + frame).sort(stable=True).indices]
    group, frame = group[order], frame[order]
    starts_frame = torch.ones_like(own, dtype=torch.bool)
    starts_frame[1:] = (group[1:] != group[:-1]) | (frame[1:] != frame[:-1])
    members, frames = torch.bincount(group), torch.bincount(group[starts_frame])
    width = members // frames
    return order[members.cumsum(dim=0) - members + (frames - 1) // 2 * width + (width - 1) // 2]


def free_slots(wanted: Tensor, settled: int, total: int) -> Tensor:
    """Move slots that are taken to the nearest free one.

    Args:
        wanted: int64 ``[K]``.
        settled: the first so many are distinct and stay.
        total: number of slots.

    Returns:
        int64 ``[K]``, distinct.

    Example:
        >>> free_slots(torch.tensor([0, 1, 1, 3]), 2, 5).tolist()
        [0, 1, 2, 3]
    """
    slots = wanted.clone()
    free = torch.ones(total, dtype=torch.bool)
    free[slots[:settled]] = False
    for index in range(settled, slots.numel()):
        left = free.nonzero().squeeze(-1)
        slots[index] = left[(left - slots[index]).abs().argmin()]
        free[slots[index]] = False
    return slots
