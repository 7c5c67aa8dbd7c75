"""Evenly spaced frames: the baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.token_pruning.frame_base import FrameSelector, VideoFrames


@register("uniform_frames", stage="frames")
@dataclass(frozen=True)
class UniformFrames(FrameSelector):
    """Encode evenly spaced frames: the middle one of each of so many equal stretches of the video."""

    def choose(self, frames: VideoFrames, kept: int) -> Tensor:
        """Return the evenly spaced frames."""
        return uniform_subset(len(frames), kept)
