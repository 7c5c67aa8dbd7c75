"""Frames of every shot, told apart by jumps of the pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.token_pruning.frame_base import FrameSelector, VideoFrames, changes
from mmfast.token_pruning.video import fit_counts

_STILL = 1e-6
"""Changes of pixels below this are rounding."""


@register("scene_cut", stage="frames")
@dataclass(frozen=True)
class SceneCut(FrameSelector):
    """Encode at least one frame of every shot, and more of the longer ones, evenly spaced within the shot.

    A shot begins where the pixels jump. If there are more shots than frames to keep, the largest jumps count.

    Attributes:
        jump: a change from one frame to the next is a cut if it is more than so many times the median change.
    """

    jump: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.jump, bool) or not isinstance(self.jump, int | float) or not self.jump >= 1:
            raise ValueError(f"jump={self.jump!r} must be a number of at least 1")

    def choose(self, frames: VideoFrames, kept: int) -> Tensor:
        """Return the frames of each shot."""
        cuts = cut_places(changes(frames.pixels)[1:].cpu(), kept - 1, self.jump)
        starts = [0, *cuts]
        lengths = [end - start for start, end in zip(starts, [*cuts, len(frames)], strict=True)]
        shares = fit_counts([kept * length / len(frames) for length in lengths], lengths, kept)
        return torch.cat([start + uniform_subset(*both) for start, *both in zip(starts, lengths, shares, strict=True)])


def cut_places(steps: Tensor, limit: int, jump: float) -> list[int]:
    """Find where shots begin, but for the first.

    Args:
        steps: ``[T-1]`` change from each frame to the next, on the CPU.
        limit: most cuts; the largest changes count, of equal ones the earlier.
        jump: how many times the median change a cut exceeds.

    Returns:
        Number of the first frame of each shot, ascending.

    Example:
        >>> cut_places(torch.tensor([0.1, 0.9, 0.1, 0.1, 0.8]), 2, 3.0), cut_places(torch.ones(4), 2, 3.0)
        ([2, 5], [])
    """
    if not steps.numel():
        return []
    order = steps.sort(descending=True, stable=True).indices
    order = order[steps[order] > max(jump * float(steps.median()), _STILL)]
    return (order[:limit].sort().values + 1).tolist()
