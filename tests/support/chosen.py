"""What a plan that chooses frames must compute: the whole video is encoded, and tokens are taken out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfast.plan import Plan
from mmfast.token_pruning.base import BeforeLLM, Method, VisionSignal
from mmfast.token_pruning.frame_base import FrameSelector, VideoFrames
from mmfast.tokens import Keep, VisualTokens
from support.families import Batch
from support.families.qwen import MERGE, PATCH, TEMPORAL, QwenVL
from support.prompts import Media

SMALL = 32
"""Pixels per side that frames are shrunk to, where they have more; those of the tiny families have not."""


def frames_of(family: Any, media: Media) -> Tensor:
    """Return the frames ``[T, 3, H, W]`` of a tiny video, the first of each temporal patch, one patch at a time."""
    pixels = media.tensors["pixel_values_videos"]
    if not isinstance(family, QwenVL):
        assert max(pixels.shape[-2:]) <= SMALL
        return pixels[0]
    time, rows, cols = media.tensors["video_grid_thw"][0].tolist()
    frames = torch.zeros(time, 3, rows * PATCH, cols * PATCH)
    patches = pixels.reshape(-1, 3, TEMPORAL, PATCH, PATCH)[:, :, 0]
    place = 0
    for frame in frames:
        for row in range(0, rows, MERGE):
            for col in range(0, cols, MERGE):
                for down in range(MERGE):
                    for right in range(MERGE):
                        top, left = (row + down) * PATCH, (col + right) * PATCH
                        frame[:, top : top + PATCH, left : left + PATCH] = patches[place]
                        place += 1
    assert place == len(patches)
    return frames


@dataclass(frozen=True)
class OnlyFrames(BeforeLLM):
    """Keep some frames of videos whole, and let another method decide about what is left.

    Attributes:
        chosen: the frames, of the first video, the second, and so on.
        inner: the other method.
        videos: which items of the prompt are videos.
    """

    name = "only_frames"
    stage = "before_llm"

    chosen: tuple[tuple[int, ...], ...] = ()
    inner: Any = None
    videos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.inner is not None:
            object.__setattr__(self, "needs", self.inner.needs)

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        return {} if self.inner is None else self.inner.vision_signals()

    def reduce(self, tokens: VisualTokens, kept: int) -> Keep:
        raise AssertionError

    def __call__(self, tokens: VisualTokens) -> Keep | None:
        if tokens.index not in self.videos:
            return None if self.inner is None else self.inner(tokens)
        frames = torch.tensor(self.chosen[self.videos.index(tokens.index)])
        left = (torch.isin(tokens.layout.frame, frames) | (tokens.layout.frame < 0)).nonzero().squeeze(-1)
        decision = None if self.inner is None else self.inner(tokens.take(left))
        if decision is None:
            return Keep(left)
        assert decision.source is None
        return Keep(left[decision.indices], decision.features, decision.sizes, None, decision.space)


def hidden_by_hand(
    alone: Batch,
    plan: str | Sequence[Method],
    signals: Callable[[Tensor], Mapping[str, Tensor]] = lambda frames: {},
) -> tuple[list[Method], list[list[int]]]:
    """Replace the method that chooses frames by one that takes their tokens out.

    Args:
        alone: one row.
        plan: a plan with a method at the stage of frames.
        signals: what is known of the frames ``[T, 3, H, W]`` beside their pixels.

    Returns:
        The methods, and the frames chosen of each video.
    """
    methods = Plan.of(plan).methods
    (selector,) = (method for method in methods if isinstance(method, FrameSelector))
    before = next((method for method in methods if isinstance(method, BeforeLLM)), None)
    (media,) = alone.media
    chosen: list[list[int]] = []
    videos = [place for place, item in enumerate(media) if item.modality == "video"]
    for place in videos:
        frames = frames_of(alone.family, media[place])
        found = selector(VideoFrames(frames.float(), signals(frames)))
        chosen.append(list(range(len(frames))) if found is None else found.tolist())
    positions = (None if before is None else before.positions) or selector.positions
    stand_in = OnlyFrames(
        1.0, positions, chosen=tuple(map(tuple, chosen)), inner=before, videos=_item_places(media, videos)
    )
    rest = [method for method in methods if method is not selector and method is not before]
    return [stand_in, *rest], chosen


def _item_places(media: Sequence[Media], videos: Sequence[int]) -> tuple[int, ...]:
    """Number the items before each video: an image may be several."""
    return tuple(sum(len(item.layouts) for item in media[:place]) for place in videos)
