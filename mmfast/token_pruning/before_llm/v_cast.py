"""V-CAST: more tokens for frames where the course of the video bends, the distinctive ones in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Selector, check_choice, top_indices
from mmfast.token_pruning.similarity import frame_places, normalised
from mmfast.token_pruning.video import fit_counts
from mmfast.tokens import VisualTokens


@register("v_cast", stage="before_llm", paper="arXiv 2603.27650", source="xinyouu/V-CAST", vectors=True)
@dataclass(frozen=True)
class VCast(Selector):
    """Split the budget by how sharply the course of the video turns at each frame.

    The curvature of a frame compares the step from the frame before with the step to the next. Inside a frame, the
    tokens of largest norm and least like the frame's mean are kept. An image is a single frame.

    The official code gives all tokens that rounding leaves over to the frame that lost most by it, instead of one
    each to those that lost most, and leaves single frames as they are (``compat="official"``).

    Paper: "V-CAST: Video Curvature-Aware Spatio-Temporal Pruning for Efficient Video Large Language Models".

    Attributes:
        temperature: of the softmax over the curvatures; the lower, the more the frames differ.
        minimum: tokens each frame keeps at least, as far as the budget reaches.
        compat: ``"official"`` takes over the counts of the official code.
    """

    keep: int | float | None = 0.25
    temperature: float = 0.7
    minimum: int = 1
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])
        if isinstance(self.temperature, bool) or not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature!r} must be a finite number above 0")
        if isinstance(self.minimum, bool) or not isinstance(self.minimum, int) or self.minimum < 0:
            raise ValueError(f"minimum={self.minimum!r} must be a count (int >= 0)")

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Return the most distinctive tokens of each frame."""
        device = tokens.features.device
        frames = [places.to(device) for places in frame_places(tokens.layout)]
        sizes = [places.numel() for places in frames]
        if self.compat == "official" and len(frames) == 1:
            return frames[0]
        means = torch.stack([normalised(tokens.features[places].float().mean(dim=0)) for places in frames])
        weights = (curvature(means) / self.temperature).softmax(dim=0).tolist()
        if self.compat == "official":
            counts = official_counts(weights, sizes, kept, self.minimum)
        else:
            # What is promised to each frame is not up for competition.
            least = min(self.minimum, kept // len(frames))
            wanted = [least + weight * (kept - least * len(frames)) for weight in weights]
            counts = fit_counts(wanted, sizes, kept, least)
        parts = zip(frames, means, counts, strict=True)
        return torch.cat(
            [places[top_indices(distinctness(tokens.features[places], mean), count)] for places, mean, count in parts]
        )


def curvature(means: Tensor) -> Tensor:
    """Say how sharply the course of the frames turns at each of them.

    Args:
        means: ``[T, D]``, one vector per frame.

    Returns:
        float32 ``[T]`` between 0 (straight on) and 2 (straight back); 1 for the first and the last.

    Example:
        >>> curvature(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0]])).tolist()
        [1.0, 0.0, 2.0, 1.0]
    """
    turns = torch.ones(means.shape[0], device=means.device)
    steps = means.float().diff(dim=0)
    if means.shape[0] > 2:
        turns[1:-1] -= cosine_similarity(steps[:-1], steps[1:], dim=-1, eps=1e-12)
    return turns


def distinctness(features: Tensor, mean: Tensor) -> Tensor:
    """Score the tokens of one frame by how unlike the frame's mean they are, and by their norm.

    Args:
        features: ``[n, D]``.
        mean: ``[D]``, of length one.

    Returns:
        float32 ``[n]``.

    Example:
        >>> score = distinctness(torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([1.0, 0.0]))
        >>> [round(value, 4) for value in score.tolist()]
        [0.0, 1.0, 1.0]
    """
    norm = features.float().norm(dim=-1)
    scaled = (norm - norm.min()) / (norm.max() - norm.min() + 1e-6)
    score: Tensor = 1.0 - normalised(features) @ mean + scaled
    return score


def official_counts(weights: Sequence[float], sizes: Sequence[int], kept: int, minimum: int) -> list[int]:
    """Split the budget as the official code does: cut off, and the rest to the frame that lost most.

    Args:
        weights: of the frames, adding up to one.
        sizes: tokens of each frame.
        kept: the budget; raised where it does not reach for ``minimum``.
        minimum: tokens each frame keeps at least.

    Example:
        >>> official_counts([0.1, 0.3, 0.6], [9, 9, 9], 10, 1)
        [2, 3, 5]
    """
    frames = range(len(sizes))
    least = [min(minimum, size) for size in sizes]
    spare = max(kept, sum(least)) - sum(least)
    shares = [weight * spare for weight in weights]
    counts = [min(own + int(share), size) for own, share, size in zip(least, shares, sizes, strict=True)]
    for _ in range(sum(least) + spare - sum(counts)):
        free = [frame for frame in frames if counts[frame] < sizes[frame]]
        counts[max(free, key=lambda frame: (shares[frame] - int(shares[frame]), -frame))] += 1
    return counts
