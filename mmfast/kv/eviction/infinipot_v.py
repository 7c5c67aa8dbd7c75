"""InfiniPot-V: of a video, what changed and what has large values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.budget import shares
from mmfast.kv.base import top_mask
from mmfast.kv.entries import Entries, Retained
from mmfast.kv.eviction.quickprefill import VisualScorer
from mmfast.registry import register

_POOLING = ((3, 7), (2, 5), (1, 3), (0, 1))
"""Over how many dimensions, and how widely, value norms are smoothed in each quarter of the layers."""


@register("infinipot_v", stage="cache", paper="arXiv 2506.15745", source="aiha-lab/InfiniPot-V", vectors=True)
@dataclass(frozen=True)
class InfiniPotV(VisualScorer):
    """Keep recent frames, earlier entries unlike them, and entries with large values; all text stays.

    A part of the budget goes to the temporal part: the newest frames as a whole, and then, of all frames before,
    those entries whose keys are least similar to the keys at the same place of the newest frames. The rest goes to
    the largest norms of the values. Where the temporal part cannot hold the newest frames, fewer of them stay
    whole; where it cannot hold one, the newest frame is what others are compared with. An image has no time,
    so that norms alone decide. Several images and videos get budgets in proportion to their entries.

    The official code does this again and again while a video comes in; here the whole prompt has been read first.

    Paper: "InfiniPot-V: Memory-Constrained KV Cache Compression for Streaming Video Understanding", NeurIPS 2025.

    Attributes:
        keep: visual entries per head.
        temporal: share of the budget that the temporal part gets.
        recent: share of the frames that are the newest, cut off.
        pooling: whether the norms of values are averaged over their neighbours: over frames, rows and columns in
            the first quarter of the layers, over rows and columns in the second, along the line in the third. Windows
            are no longer than the grid; frames have to be of equal size.
        rows: rows of patches in a frame, for ``pooling``; 0 = as square as the number of its tokens allows, which
            also holds for frames that cannot be cut into so many rows.
    """

    temporal: float = 0.5
    recent: float = 0.25
    pooling: bool = False
    rows: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("temporal", "recent"):
            value = getattr(self, field)
            if isinstance(value, bool) or not 0 <= value <= 1:
                raise ValueError(f"{field}={value!r} must be a number from 0 to 1")
        if isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 0:
            raise ValueError(f"rows={self.rows!r} must be an int of at least 0: rows of patches in a frame")

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Keep the entries of highest score in each image and video, which have budgets of their own."""
        kept_mask = (~entries.visual).expand(entries.heads, -1).clone()
        for places, room in media_rooms(entries, kept):
            score = torch.nan_to_num(self.media_score(entries.take(places), room), nan=-torch.inf, posinf=torch.inf)
            kept_mask[:, places] = top_mask(score, room)
        return Retained(kept_mask)

    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return the norms of values, ``[G, n]``; the temporal part of each image and video is forced."""
        scores = torch.full((entries.heads, len(entries)), -torch.inf, device=entries.keys.device)
        for places, room in media_rooms(entries, kept):
            scores[:, places] = self.media_score(entries.take(places), room)
        return scores

    def media_score(self, entries: Entries, room: int) -> Tensor:
        """Score one image or video, float32 ``[G, v]``.

        Args:
            entries: its entries, in the order of the frames.
            room: how many of them stay.
        """
        frame = entries.frame.unique_consecutive(return_inverse=True)[1]
        norms: Tensor = entries.values.float().norm(dim=-1)
        if self.pooling:
            norms = self.pooled_norms(norms, frame, entries.layer, entries.depth)
        budget = room - round((1 - self.temporal) * room)
        return norms.masked_fill(self.temporal_part(entries.keys, frame, budget), torch.inf)

    def temporal_part(self, keys: Tensor, frame: Tensor, budget: int) -> Tensor:
        """Choose the newest frames and what is unlike them.

        Args:
            keys: ``[G, v, d]``.
            frame: int64 ``[v]``, frames counted from 0, ascending.
            budget: entries to choose.

        Returns:
            bool ``[G, v]``.
        """
        sizes = frame.bincount()
        frames = len(sizes)
        newest = int(frames * self.recent)
        # What the newest frames hold, the newest one first.
        whole = min(newest, int((sizes.flip(0).cumsum(0) <= budget).sum()))
        if frames == 1 or budget == 0:
            return torch.zeros(keys.shape[:2], dtype=torch.bool, device=keys.device)
        recent = frame >= frames - whole
        likeness = temporal_likeness(keys, frame, max(1, whole))
        score = torch.nan_to_num(-likeness, nan=-torch.inf).masked_fill(recent, torch.inf)
        return top_mask(score, budget)

    def pooled_norms(self, norms: Tensor, frame: Tensor, layer: int, depth: int) -> Tensor:
        """Smooth ``[G, v]`` norms of values as the layer asks for; same shape."""
        sizes = frame.bincount()
        per_frame = int(sizes[0])
        dimensions, width = _POOLING[min(layer // max(1, depth // len(_POOLING)), len(_POOLING) - 1)]
        if dimensions == 0 or not bool((sizes == per_frame).all()):
            return norms
        if dimensions == 1:
            return functional.avg_pool1d(norms, width, stride=1, padding=width // 2)
        rows = self.rows if self.rows and per_frame % self.rows == 0 else squarest_rows(per_frame)
        grid = norms.reshape(len(norms), len(sizes), rows, -1)
        # The widest odd window that is nowhere longer than the grid, frames included.
        width = (min(width, *grid.shape[1:]) - 1) // 2 * 2 + 1
        pool = functional.avg_pool3d if dimensions == 3 else functional.avg_pool2d
        return pool(grid, width, stride=1, padding=width // 2).reshape(norms.shape)


def media_rooms(entries: Entries, kept: int) -> list[tuple[Tensor, int]]:
    """Share a budget among the images and videos of a prompt.

    Args:
        entries: the prompt.
        kept: entries that stay, all text included.

    Returns:
        For each image or video int64 ``[v]`` places of its entries, and how many of them stay.

    Example:
        >>> zeros, media = torch.zeros(1, 7, 2), torch.tensor([0, 0, 0, 0, -1, 1, 1])
        >>> entries = Entries.of(zeros, zeros, visual=media >= 0, media=media)
        >>> [(places.tolist(), room) for places, room in media_rooms(entries, 4)]
        [([0, 1, 2, 3], 2), ([5, 6], 1)]
    """
    seen = entries.visual.nonzero().squeeze(-1)
    parts = [seen[entries.media[seen] == media] for media in entries.media[seen].unique()]
    room = max(0, kept - int((~entries.visual).sum()))
    return list(zip(parts, shares(room, [len(part) for part in parts]), strict=True))


def temporal_likeness(keys: Tensor, frame: Tensor, recent: int) -> Tensor:
    """Compare each key with those at the same place of the newest frames, by the mean of the cosines.

    Args:
        keys: ``[G, v, d]``.
        frame: int64 ``[v]``, frames counted from 0, ascending.
        recent: how many frames are the newest.

    Returns:
        float32 ``[G, v]``; 0 where no newest frame has that place.

    Example:
        >>> keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 0.0]]])
        >>> temporal_likeness(keys, torch.tensor([0, 0, 1, 1]), 1).tolist()
        [[1.0, 0.0, 1.0, 1.0]]
    """
    sizes = frame.bincount()
    place = torch.arange(len(frame), device=keys.device) - (sizes.cumsum(0) - sizes)[frame]
    directions = functional.normalize(keys.float(), dim=-1)
    new = frame >= len(sizes) - recent
    width = int(sizes.max())
    sums = directions.new_zeros(keys.shape[0], width, keys.shape[-1]).index_add(1, place[new], directions[:, new])
    counts = place[new].bincount(minlength=width).clamp_min(1)
    return (directions * (sums / counts[:, None])[:, place]).sum(dim=-1)


def squarest_rows(tokens: int) -> int:
    """Say into how many rows a frame is cut if nobody knows: the most that are no longer than the columns.

    Example:
        >>> squarest_rows(196), squarest_rows(12), squarest_rows(7)
        (14, 3, 1)
    """
    return next(rows for rows in range(int(tokens**0.5), 0, -1) if tokens % rows == 0)
