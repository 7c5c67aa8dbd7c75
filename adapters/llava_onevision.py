"""LLaVA-OneVision: AnyRes images, videos with one newline token at their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.base import family
from mmfast.adapters.llava_next import LlavaNext, frames_per_video
from mmfast.tokens import Layout


@family("llava_onevision")
class LlavaOnevision(LlavaNext):
    """As LLaVA-NeXT; its packing may also shrink the crops, which the coordinates survive."""

    signals = LlavaNext.signals | {"video_frames"}

    def video_layouts(self, arguments: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Lay out frames pooled to half their side, rounded up, and the newline at the end of each video."""
        # Not from the number of features: transformers 5.17 adds the newline later.
        side = -(-self._side // 2)
        layout = Layout.grid(side, side, frames=frames_per_video(arguments), modality="video").with_newline()
        return [layout] * len(features)

    def align_videos(self, arguments: Mapping[str, Any], maps: Tensor) -> list[Tensor]:
        """Shrink the frames as the model does; the newline gets zeros."""
        videos = super().align_videos(arguments, self.base.apply_pooling(maps))
        return [torch.cat([video, video.new_zeros(1, video.shape[-1])]) for video in videos]
