"""Idefics3 and SmolVLM: square tiles between row and column tags, which are text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmfast.adapters.base import Adapter, family
from mmfast.tokens import Layout


@family("idefics3", "smolvlm")
class Idefics3(Adapter):
    """Each tile is one item; tags such as ``<row_1_col_1>`` are text and stay."""

    def patches_per_side(self, modality: str) -> int | None:
        """Squares of patches are joined."""
        return int(self.model.config.scale_factor)

    def layouts(self, modality: str, arguments: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Tell the tiles apart: some releases return the tiles of a whole prompt as one item."""
        return super().layouts(modality, arguments, self._tiles(features))

    def align(
        self, modality: str, arguments: Mapping[str, Any], maps: Tensor, features: Sequence[Tensor]
    ) -> list[Tensor]:
        """Average the patches that become one token."""
        return super().align(modality, arguments, maps, self._tiles(features))

    def _tiles(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [part for item in features for part in item.split(self.base.image_seq_len) if len(part)]
