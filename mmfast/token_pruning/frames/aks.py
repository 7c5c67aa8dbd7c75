"""AKS: split the video where scores are spread out, keep stretches whole where they peak."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.token_pruning.frame_base import FrameScorer, VideoFrames, best_frames, completed, unit_range


@register("aks", stage="frames", paper="arXiv 2502.21271", source="ncTimTang/AKS", vectors=True)
@dataclass(frozen=True)
class Aks(FrameScorer):
    """Encode the best frames of stretches of the video, halved until their best frames stand out or they are short.

    A stretch that was halved d times gives ``keep / 2**d`` frames. The official code cuts that number off, down to
    none at all where ``keep`` is below ``2**depth``; here stretches are halved only so often that each gives one,
    and the frames of highest score that are missing fill up the count. Where all frames score the same, they are
    evenly spaced.

    Paper: "Adaptive Keyframe Sampling for Long Video Understanding", CVPR 2025.

    Attributes:
        threshold: a stretch is not halved if the mean of its ``keep`` best scores exceeds its mean by more, scores
            stretched to 0..1.
        deviation: and if the standard deviation of its scores is above this; by default it always is.
        depth: most halvings.
    """

    threshold: float = 0.8
    deviation: float = -100.0
    depth: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threshold", "deviation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise ValueError(f"{name}={value!r} must be a number")
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or not 0 <= self.depth <= 16:
            raise ValueError(f"depth={self.depth!r} must be an int in 0..16")

    def choose(self, frames: VideoFrames, kept: int) -> Tensor:
        """Return the best frames of each stretch."""
        scores = unit_range(self.scores(frames))
        if scores is None:
            return uniform_subset(len(frames), kept)
        depth = min(self.depth, kept.bit_length() - 1)
        parts = stretches(scores, kept, self.threshold, self.deviation, depth)
        return completed(best_of(scores, parts, kept), scores, kept)


def stretches(scores: Tensor, count: int, threshold: float, deviation: float, depth: int) -> list[tuple[int, int, int]]:
    """Halve a video until the best frames of each stretch stand out.

    Args:
        scores: float64 ``[T]`` in 0..1.
        count: how many of the best are compared with the mean.
        threshold: by how much these have to exceed the mean.
        deviation: least standard deviation of a stretch that is left whole before the last halving.
        depth: most halvings.

    Returns:
        Begin, end and halvings of each stretch, those halved least first.

    Example:
        >>> stretches(torch.tensor([0.0, 0.0, 0.0, 1.0]).double(), 1, 0.6, -100.0, 2)
        [(0, 4, 0)]
        >>> stretches(torch.tensor([0.0, 0.0, 0.0, 1.0]).double(), 2, 0.6, -100.0, 1)
        [(0, 2, 1), (2, 4, 1)]
    """
    whole: list[tuple[int, int, int]] = []
    level = [(0, len(scores))]
    for halvings in range(depth + 1):
        split = []
        for begin, end in level:
            if halvings < depth and not _stands_out(scores[begin:end], count, threshold, deviation):
                middle = begin + (end - begin) // 2
                split += [(begin, middle), (middle, end)]
            else:
                whole.append((begin, end, halvings))
        level = split
    return whole


def _stands_out(scores: Tensor, count: int, threshold: float, deviation: float) -> bool:
    best = scores.sort(descending=True).values[:count].mean()
    return bool(best - scores.mean() > threshold) and bool(scores.std(correction=0) > deviation)


def best_of(scores: Tensor, parts: list[tuple[int, int, int]], count: int) -> Tensor:
    """Take of each stretch the share of ``count`` that its halvings leave it.

    Args:
        scores: ``[T]``.
        parts: begin, end and halvings of each stretch.
        count: frames that the whole video would give.

    Returns:
        int64, ascending.

    Example:
        >>> best_of(torch.tensor([0.1, 0.2, 0.9, 0.8]), [(0, 2, 1), (2, 4, 1)], 2).tolist()
        [1, 2]
    """
    found = [begin + best_frames(scores[begin:end], count // 2**halvings) for begin, end, halvings in parts]
    return torch.cat(found).sort().values
