"""The kind of method that decides which frames of a video are encoded, and how frames are scored.

A frame that is not chosen never enters the vision encoder, so its time is saved as well as its tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmfast.budget import check_keep, count
from mmfast.token_pruning.base import Method, Positions, check_choice

_SAME = 1e-6
"""Scores that lie in a smaller range are all the same."""


@dataclass(frozen=True)
class VideoFrames:
    """What is known of the frames of ONE video before any of them is encoded.

    Where a model joins neighbouring frames into one temporal patch, a frame is such a patch, shown by the first of
    the frames in it: they can only be chosen together.

    Attributes:
        pixels: ``[T, 3, h, w]`` float32, the frames shrunk to a few pixels, normalised as the model reads them.
        signals: with a CLIP model, ``"clip_frame_embeds"`` ``[T, E]`` and ``"clip_text_embeds"`` ``[M, E]``, float32:
            the frames and the question, which takes several rows where it is longer than CLIP's context.
    """

    pixels: Tensor
    signals: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.pixels.shape[0])


@dataclass(frozen=True)
class FrameSelector(Method):
    """Decide which frames of a video are encoded at all; the others are cut out of the prompt.

    Attributes:
        keep: frames that are encoded; int = count per video, float in (0, 1] = fraction. Where a model joins frames
            into temporal patches, these are counted.
        positions: ``"keep"`` leaves each token its position id, so that gaps in time stay visible, ``"compact"``
            renumbers the shortened prompt as if the video had no other frames; None takes what suits the model
            (compact for one-dimensional RoPE).
    """

    kind: ClassVar[str] = "FrameSelector"
    needs: ClassVar[frozenset[str]] = frozenset({"video_frames"})

    keep: int | float = 8
    positions: Positions = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("positions", self.positions, [None, "keep", "compact"])

    @property
    def wants_clip(self) -> bool:
        """Whether embeddings of a CLIP model are needed."""
        return False

    def keep_count(self, frames: int) -> int:
        """Say how many of ``frames`` are encoded; the promise that tests hold."""
        return count(self.keep, frames)

    @abstractmethod
    def choose(self, frames: VideoFrames, kept: int) -> Tensor:
        """Return ``kept`` distinct int64 frame numbers, ascending; ``1 <= kept < T``."""

    def __call__(self, frames: VideoFrames) -> Tensor | None:
        """Choose frames of one video; None means all of them.

        Returns:
            int64 ``[K]``, ascending, on the CPU.

        Raises:
            ValueError: if the method broke its promise.
        """
        kept = self.keep_count(len(frames))
        if kept >= len(frames):
            return None
        chosen = self.choose(frames, kept).cpu()
        legal = chosen.shape == (kept,) and bool((chosen.diff() > 0).all())
        if not legal or int(chosen[0]) < 0 or int(chosen[-1]) >= len(frames):
            raise ValueError(
                f"method {self.name!r} must choose {kept} distinct frames of {len(frames)}, ascending, got "
                f"{chosen.tolist()}"
            )
        return chosen


@dataclass(frozen=True)
class FrameScorer(FrameSelector):
    """Choose by a score per frame.

    Attributes:
        relevance: ``"change"`` scores a frame by how much it differs from the one before, which needs no other model
            and does not read the question; ``"clip"`` by how well it fits the question in the space of a CLIP model
            passed to :func:`mmfast.accelerate`.
    """

    reads_question: ClassVar[bool] = True

    relevance: Literal["change", "clip"] = "change"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("relevance", self.relevance, ["change", "clip"])

    @property
    def wants_clip(self) -> bool:
        """Whether embeddings of a CLIP model are needed."""
        return self.relevance == "clip"

    def scores(self, frames: VideoFrames) -> Tensor:
        """Score each frame, float64 ``[T]``."""
        if self.relevance == "change":
            return changes(frames.pixels)
        return fit_to_text(frames.signals["clip_frame_embeds"], frames.signals["clip_text_embeds"])


def changes(pixels: Tensor) -> Tensor:
    """Say how much each frame differs from the one before; the first is taken to differ like the second.

    Args:
        pixels: ``[T, ...]``.

    Returns:
        float64 ``[T]``, mean absolute differences.

    Example:
        >>> changes(torch.tensor([[0.0], [1.0], [1.0], [4.0]])).tolist()
        [1.0, 1.0, 0.0, 3.0]
    """
    if len(pixels) == 1:
        return torch.zeros(1, dtype=torch.float64, device=pixels.device)
    steps = pixels.flatten(1).double().diff(dim=0).abs().mean(dim=1)
    return torch.cat([steps[:1], steps])


def fit_to_text(frames: Tensor, text: Tensor) -> Tensor:
    """Compare frames with a question: the mean cosine over the rows of the question.

    Args:
        frames: ``[T, E]``.
        text: ``[M, E]``.

    Returns:
        float64 ``[T]``.

    Example:
        >>> fit_to_text(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0]])).tolist()
        [0.0, 1.0]
    """
    return cosine_similarity(frames.double()[:, None], text.double(), dim=-1, eps=1e-12).mean(dim=1)


def unit_range(scores: Tensor) -> Tensor | None:
    """Stretch scores to 0..1; None where they are all the same, so that there is nothing to go by.

    Args:
        scores: ``[T]``; what is not finite counts as the lowest.

    Returns:
        float64 ``[T]``.

    Example:
        >>> unit_range(torch.tensor([1.0, 3.0, 2.0])).tolist(), unit_range(torch.ones(3))
        ([0.0, 1.0, 0.5], None)
    """
    values = scores.double()
    finite = values.isfinite()
    if not bool(finite.any()):
        return None
    values = values.masked_fill(~finite, float(values[finite].min()))
    low, high = values.min(), values.max()
    # Rounding must not be taken for a difference.
    if high - low <= _SAME * torch.maximum(high.abs(), low.abs()):
        return None
    return (values - low) / (high - low)


def completed(chosen: Tensor, scores: Tensor, kept: int) -> Tensor:
    """Make a choice complete with the frames of highest score that are missing; ties go to the earlier frame.

    Args:
        chosen: int64, frames that are in it, in any order and perhaps more than once.
        scores: ``[T]``.
        kept: frames to choose, at least as many as are in it.

    Returns:
        int64 ``[kept]``, ascending.

    Example:
        >>> completed(torch.tensor([2, 2]), torch.tensor([0.1, 0.9, 0.5, 0.7]), 3).tolist()
        [1, 2, 3]
    """
    ranked = scores.clone()
    ranked[chosen] = torch.inf
    return best_frames(ranked, kept)


def best_frames(scores: Tensor, count: int) -> Tensor:
    """Return the frames of highest score, ascending; ties go to the earlier frame.

    Example:
        >>> best_frames(torch.tensor([0.3, 0.9, 0.3]), 2).tolist()
        [0, 1]
    """
    return scores.sort(descending=True, stable=True).indices[:count].sort().values
