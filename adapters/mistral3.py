"""Mistral 3 (Pixtral tower): native resolution; row breaks are text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmfast.adapters.alignment import pool_grid
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

    def sequences(self, modality: str, arguments: Mapping[str, Any]) -> list[int] | None:
        """All images stand in one sequence."""
        return [rows * cols for rows, cols in self._grids(arguments)]

    def align(
        self, modality: str, arguments: Mapping[str, Any], maps: Tensor, features: Sequence[Tensor]
    ) -> list[Tensor]:
        """Average the patches that are merged."""
        grids, factor = self._grids(arguments), self.model.config.spatial_merge_size
        parts = maps[0].split([rows * cols for rows, cols in grids])
        return [pool_grid(part, rows, cols, factor) for part, (rows, cols) in zip(parts, grids, strict=True)]

    def _grids(self, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Return rows and columns of patches per image."""
        patch = self.model.config.vision_config.patch_size
        return [(int(height) // patch, int(width) // patch) for height, width in arguments["image_sizes"]]
