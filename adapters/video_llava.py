"""Video-LLaVA: square image grids; video frames that keep their CLS token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.base import Adapter, family, square_or_unknown
from mmfast.tokens import Layout


@family("video_llava")
class VideoLlava(Adapter):
    """Eight frames per video, each a CLS token followed by a square grid."""

    def layouts(self, modality: str, arguments: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Join the frames of a video; the features come one frame at a time."""
        if modality == "image":
            return super().layouts(modality, arguments, features)
        frames = int(arguments["pixel_values_videos"].shape[1])
        return [_frames_with_cls(frames, len(features[start])) for start in range(0, len(features), frames)]


def _frames_with_cls(frames: int, tokens: int) -> Layout:
    grid = square_or_unknown(tokens - 1, "video")
    if not grid.grid_known:
        return Layout.unknown(frames * tokens, "video")

    # The CLS token sees the whole frame: it is an ordinary candidate without a place of its own.
    def per_frame(values: Tensor, cls: int) -> Tensor:
        return torch.cat([torch.tensor([cls]), values]).repeat(frames)

    boxes = torch.cat([torch.zeros(1, 4), grid.boxes]).repeat(frames, 1) if grid.boxes is not None else None
    return Layout(
        "video",
        torch.arange(frames).repeat_interleave(tokens),
        per_frame(grid.tile, 0),
        per_frame(grid.row, -1),
        per_frame(grid.col, -1),
        torch.zeros(frames * tokens, dtype=torch.bool),
        boxes,
        grid_known=False,
    )
