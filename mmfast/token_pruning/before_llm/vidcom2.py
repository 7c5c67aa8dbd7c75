"""VidCom2: keep what is unlike the whole video and unlike its frame, more of it in uncommon frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Selector, check_choice, top_indices
from mmfast.token_pruning.similarity import frame_places, normalised
from mmfast.token_pruning.video import fit_counts
from mmfast.tokens import VisualTokens

_TEMPERATURE = 0.01
_WIDTHS = [2.0**power for power in range(-3, 2)]
"""Squared widths of the five Gaussians that make up the likeness of two tokens."""


@register("vidcom2", stage="before_llm", paper="arXiv 2505.14454", source="xuyang-liu16/VidCom2", vectors=True)
@dataclass(frozen=True)
class VidCom2(Selector):
    """Keep the tokens least like the mean of the video and the mean of their frame.

    Likeness is measured in the half of the channels that vary least. Frames whose tokens are less like the video get
    more of the budget, at most two times their even share. An image is a single frame.

    Counts are adjusted so that they add up to ``keep``; those of the official code are rounded frame by frame
    (``compat="official"``).

    Paper: "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models",
    EMNLP 2025.

    Attributes:
        compat: ``"official"`` takes over the counts of the official code.
    """

    keep: int | float | None = 0.25
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Return the tokens least like their video and frame."""
        device = tokens.features.device
        frames = [places.to(device) for places in frame_places(tokens.layout)]
        sizes = [places.numel() for places in frames]
        video, frame = likeness(tokens.features, frames)
        share = self.keep if self.compat == "official" and isinstance(self.keep, float) else kept / len(tokens)
        wanted = (frame_scales(video, share) * torch.tensor(sizes, device=device)).tolist()
        if self.compat == "official":
            counts = [min(size, max(1, round(want))) for want, size in zip(wanted, sizes, strict=True)]
        else:
            counts = fit_counts(wanted, sizes, kept)
        parts = zip(frames, video, frame, counts, strict=True)
        return torch.cat([places[top_indices(-(near + own), count)] for places, near, own, count in parts])


def steady_channels(features: Tensor) -> Tensor:
    """Return the half of the channels that vary least over all tokens, ``[max(1, D // 2)]`` int64.

    Args:
        features: ``[N, D]``.

    Example:
        >>> steady_channels(torch.tensor([[0.0, 1.0, 5.0, 2.0], [9.0, 1.0, 4.0, 2.0]])).tolist()
        [1, 3]
    """
    variance = features.float().var(dim=0, correction=0)
    return top_indices(-variance, max(1, variance.numel() // 2))


def likeness(features: Tensor, frames: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Say how much each token is like the mean of the video, and like the mean of its frame.

    Args:
        features: ``[N, D]``.
        frames: int64 places of each frame; together all N.

    Returns:
        Two lists with a float32 ``[n]`` for each frame, between 0 and 5.

    Example:
        >>> features = torch.tensor([[1.0, 9.0], [1.0, 0.0], [-1.0, 5.0]])
        >>> video, frame = likeness(features, [torch.tensor([0, 1]), torch.tensor([2])])
        >>> [part.tolist() for part in frame]
        [[5.0, 5.0], [5.0]]
    """
    channels = steady_channels(features)
    units = [normalised(features[places][:, channels]) for places in frames]
    centre = torch.stack([unit.sum(dim=0) for unit in units]).sum(dim=0) / sum(map(len, units))
    return [_gaussians(unit, centre) for unit in units], [_gaussians(unit, unit.mean(dim=0)) for unit in units]


def _gaussians(unit: Tensor, centre: Tensor) -> Tensor:
    squared = (unit - centre).square().sum(dim=-1)
    return torch.stack([(-squared / (2.0 * width)).exp() for width in _WIDTHS]).sum(dim=0)


def frame_scales(likeness: Sequence[Tensor], keep: float) -> Tensor:
    """Say what share of its tokens each frame keeps.

    Args:
        likeness: ``[n]`` of each frame's tokens to the video.
        keep: share of all tokens.

    Returns:
        float32 ``[T]``, at most 1.

    Example:
        >>> frame_scales([torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])], 0.25).tolist()
        [0.125, 0.375]
    """
    rareness = -torch.stack([part.mean() for part in likeness])
    weights = ((rareness - rareness.max()) / _TEMPERATURE).softmax(dim=0)
    return (keep * (1.0 + weights - weights.mean())).clamp_max(1.0)
