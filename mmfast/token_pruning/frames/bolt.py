"""BOLT: sample frames in proportion to their score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.token_pruning.frame_base import FrameScorer, VideoFrames, best_frames, completed, unit_range


@register("bolt", stage="frames", paper="arXiv 2503.21483", source="sming256/BOLT", vectors=True)
@dataclass(frozen=True)
class Bolt(FrameScorer):
    """Encode the frames at equal steps of the sum of scores, so that stretches that score high are sampled densely.

    Where several steps fall on one frame the official code takes it several times; here the frames of highest score
    that are missing fill up the count. Where all frames score the same, they are evenly spaced.

    Paper: "BOLT: Boost Large Vision-Language Model Without Training for Long-form Video Understanding".

    Attributes:
        power: exponent of the scores, stretched to 0..1; more than 1 favours the best.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.power, bool) or not isinstance(self.power, int | float) or not 0 < self.power < 100:
            raise ValueError(f"power={self.power!r} must be a number above 0 and below 100")

    def choose(self, frames: VideoFrames, kept: int) -> Tensor:
        """Return the sampled frames."""
        scores = unit_range(self.scores(frames))
        if scores is None:
            return uniform_subset(len(frames), kept)
        if kept == 1:
            # The two ends of the row of steps cross: the official code takes the last frame with any score.
            return best_frames(scores, 1)
        return completed(sampled(scores, kept, self.power), scores, kept)


def sampled(scores: Tensor, count: int, power: float = 1.0) -> Tensor:
    """Sample by inverse transform at equal steps.

    Args:
        scores: float64 ``[T]`` in 0..1, not all 0.
        count: number of samples.
        power: exponent.

    Returns:
        int64 ``[count]``, ascending; a frame may occur more than once.

    Example:
        >>> sampled(torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]), 3).tolist()
        [1, 3, 3]
    """
    weights = scores**power
    steps = (weights / weights.sum()).cumsum(dim=0)
    points = torch.linspace(1 / count, 1 - 1 / count, count, dtype=steps.dtype, device=steps.device)
    return torch.searchsorted(steps, points).clamp_max(len(scores) - 1)
