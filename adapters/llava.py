"""LLaVA 1.5 and VipLLaVA: one grid per image, no special tokens inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmfast.adapters.alignment import is_plain
from mmfast.adapters.base import Adapter, family
from mmfast.tokens import Layout


@family("llava", "vipllava")
class Llava(Adapter):
    """The plain case: square images, unless the vision encoder takes images of native size, as Pixtral's does."""

    merges_in_encoder = True

    def layouts(self, modality: str, arguments: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Compute the grids from the image sizes, where they are given."""
        grids = self._grids(modality, arguments)
        if grids is None:
            return super().layouts(modality, arguments, features)
        return [Layout.grid(rows, cols) for rows, cols in grids]

    def sequences(self, modality: str, arguments: Mapping[str, Any]) -> list[int] | None:
        """Images of native size stand in one sequence."""
        grids = self._grids(modality, arguments)
        return None if grids is None else [rows * cols for rows, cols in grids]

    def patches_per_side(self, modality: str) -> int | None:
        """A patch is a token."""
        return 1 if is_plain(self.tower(modality)) else None

    def projectable(self, modality: str, arguments: Mapping[str, Any]) -> bool:
        """VipLLaVA joins the features of several blocks; where it is one, the projector sees single patches."""
        return len(self.feature_layers(arguments)) == 1

    def _grids(self, modality: str, arguments: Mapping[str, Any]) -> list[tuple[int, int]] | None:
        """Return rows and columns of patches per image, where the encoder is told the sizes."""
        sizes, patch = arguments.get("image_sizes"), getattr(self.tower(modality), "patch_size", None)
        if sizes is None or patch is None:
            return None
        return [(int(height) // patch, int(width) // patch) for height, width in sizes]
