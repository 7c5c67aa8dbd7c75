"""Mistral 3 (Pixtral tower): native resolution; row breaks are text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmfast.adapters.base import Adapter, family
from mmfast.tokens import Layout


@family("mistral3")
class Mistral3(Adapter):
    """``[IMG_BREAK]`` and ``[IMG_END]`` are ordinary text tokens between the visual ones."""

    def layouts(self, modality: str, arguments: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Compute the grids from the image sizes in pixels."""
        unit = self.model.config.vision_config.patch_size * self.model.config.spatial_merge_size
        return [
            Layout.grid(int(height) // unit, int(width) // unit)
            for height, width in (size for size in arguments["image_sizes"])
        ]
