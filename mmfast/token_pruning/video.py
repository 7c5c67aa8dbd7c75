"""What methods for videos share: the same place in two frames, counts per frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmfast.tokens import Layout

_STILL = 1e-6
"""Tokens whose cosine is closer to one are the same."""


def counterparts(layout: Layout, own: Tensor, other: Tensor) -> Tensor:
    """Find for each token of a frame the token at the same place of another frame.

    Frames with as many tokens are laid out alike, so the order says which is which, also where the grid is not
    known; otherwise tile, row and column have to agree.

    Args:
        layout: of the video.
        own: int64 ``[n]`` places of the tokens of one frame.
        other: int64 ``[m]`` places of those of the other.

    Returns:
        int64 ``[n]`` places; -1 where the other frame has no such token.

    Example:
        >>> layout = Layout.grid(1, 2, frames=2)
        >>> counterparts(layout, torch.tensor([2, 3]), torch.tensor([0, 1])).tolist()
        [0, 1]
        >>> counterparts(layout, torch.tensor([2, 3]), torch.tensor([1])).tolist()
        [-1, 1]
    """
    if own.numel() == other.numel():
        return other
    keys = torch.stack([layout.tile, layout.row, layout.col], dim=-1)
    same = (keys[own][:, None] == keys[other]).all(dim=-1)
    return torch.where(same.any(dim=1), other[same.int().argmax(dim=1)], -1)


def place_similarity(features: Tensor, layout: Layout, own: Tensor, other: Tensor) -> Tensor:
    """Compare each token of a frame with the one at the same place of another frame.

    Args:
        features: ``[N, D]``.
        layout: of the video.
        own: int64 ``[n]`` places of the tokens of the frame.
        other: int64 ``[m]`` places of those of the other frame.

    Returns:
        float32 ``[n]`` cosines; -1, the least there is, where the other frame has no such token.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, -1.0]])
        >>> layout = Layout.grid(1, 2, frames=2)
        >>> place_similarity(features, layout, torch.tensor([2, 3]), torch.tensor([0, 1])).tolist()
        [1.0, -1.0]
    """
    partner = counterparts(layout, own, other)
    found = partner >= 0
    device = features.device
    cosine = torch.full((own.numel(),), -1.0, device=device)
    ours, theirs = features[own[found].to(device)].float(), features[partner[found].to(device)].float()
    cosine[found.to(device)] = cosine_similarity(ours, theirs, dim=-1, eps=1e-12)
    return cosine


def unrounded(cosine: Tensor) -> Tensor:
    """Set to one what is one but for rounding, which must not say which token of a still scene changed most.

    Example:
        >>> unrounded(torch.tensor([1.0 + 2e-7, 1.0 - 2e-7, 0.5])).tolist()
        [1.0, 1.0, 0.5]
    """
    return cosine.masked_fill(cosine > 1.0 - _STILL, 1.0)


def fit_counts(wanted: Sequence[float], sizes: Sequence[int], total: int, least: int = 1) -> list[int]:
    """Round wanted counts per frame so that they add up exactly and none exceeds its frame.

    What does not fit into a frame goes to the others in proportion to what they want. What rounding and ``least``
    leave over, or take too much, is made up for token by token, where a frame is farthest from what it wants.

    Args:
        wanted: tokens each frame should keep, in proportion.
        sizes: tokens each frame has.
        total: what the counts have to add up to, at most the sum of the sizes.
        least: tokens each frame keeps at least, as far as ``total`` reaches.

    Example:
        >>> fit_counts([2.6, 2.6, 9.0], [5, 5, 6], 14), fit_counts([0.1, 3.9], [4, 4], 4)
        ([4, 4, 6], [1, 3])
        >>> fit_counts([0.1, 0.2, 0.3], [4, 4, 4], 2)
        [0, 1, 1]
    """
    frames = range(len(sizes))
    goal = _filled(wanted, sizes, total)
    counts = [min(size, max(least, round(want))) for want, size in zip(goal, sizes, strict=True)]
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        free = [frame for frame in frames if counts[frame] < sizes[frame]]
        if step < 0:
            free = [frame for frame in frames if counts[frame] > least] or [frame for frame in frames if counts[frame]]
        chosen = max(free, key=lambda frame: (step * (goal[frame] - counts[frame]), -frame))
        counts[chosen] += step
    return counts


def _filled(wanted: Sequence[float], sizes: Sequence[int], total: int) -> list[float]:
    """Scale to the sum wanted; frames that would overflow are filled, and the others share what is left."""
    goal = [float(size) for size in sizes]
    free = list(range(len(sizes)))
    while free:
        whole = sum(wanted[frame] for frame in free)
        left = total - sum(goal) + sum(sizes[frame] for frame in free)
        parts = {frame: left * (wanted[frame] / whole if whole > 0 else 1 / len(free)) for frame in free}
        fitting = [frame for frame in free if parts[frame] <= sizes[frame]]
        if len(fitting) == len(free):
            for frame in free:
                goal[frame] = parts[frame]
            break
        free = fitting
    return goal
