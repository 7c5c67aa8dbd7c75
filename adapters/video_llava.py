"""Video-LLaVA: square image grids; video frames that keep their CLS token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.alignment import is_plain
from mmfast.adapters.base import Adapter, family, square_or_unknown
from mmfast.adapters.llava_next import frames_per_video
from mmfast.tokens import Layout


@family("video_llava")
class VideoLlava(Adapter):
    """Eight frames per video, each a CLS token followed by a square grid.

    The CLS token of a frame is a visual token: its signals are its own key, query and features, and
    where only patches have a value, the mean of its frame.
    """

    merges_in_encoder = True
    signals = Adapter.signals | {"video_frames"}

    def tower(self, modality: str) -> Any:
        """There is one encoder for images and one for videos."""
        return self.base.video_tower if modality == "video" else self.base.image_tower

    def keeps_class_token(self, modality: str, arguments: Mapping[str, Any]) -> bool:
        """Videos keep it."""
        return modality == "video" or super().keeps_class_token(modality, arguments)

    def patches_per_side(self, modality: str) -> int | None:
        """A patch is a token."""
        return 1 if is_plain(self.tower(modality)) else None

    def tiles_per_item(self, modality: str, arguments: Mapping[str, Any]) -> int:
        """Frames are encoded one by one."""
        return frames_per_video(arguments) if modality == "video" else 1

    def projectable(self, modality: str, arguments: Mapping[str, Any]) -> bool:
        """The projector sees single patches, unless it joins the features of several blocks."""
        return len(self.feature_layers(arguments)) == 1

    def layouts(self, modality: str, arguments: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Join the frames of a video; the features come one frame at a time."""
        if modality == "image":
            return super().layouts(modality, arguments, features)
        frames = frames_per_video(arguments)
        return [_frames_with_cls(frames, len(features[start])) for start in range(0, len(features), frames)]

    def align(
        self, modality: str, arguments: Mapping[str, Any], maps: Tensor, features: Sequence[Tensor]
    ) -> list[Tensor]:
        """Join the frames of a video."""
        if modality == "image":
            return super().align(modality, arguments, maps, features)
        return list(maps.unflatten(0, (-1, frames_per_video(arguments))).flatten(1, 2))


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
