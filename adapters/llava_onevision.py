"""LLaVA-OneVision: AnyRes images, videos with one newline token at their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmfast.adapters.base import family
from mmfast.adapters.llava_next import LlavaNext, video_grids
from mmfast.tokens import Layout


@family("llava_onevision")
class LlavaOnevision(LlavaNext):
    """As LLaVA-NeXT; its packing may also shrink the crops, which the coordinates survive."""

    def video_layouts(self, arguments: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Divide each video evenly over its frames; the last token is a newline."""
        return video_grids(features, int(arguments["pixel_values_videos"].shape[1]), extra=1)
