"""PaliGemma and Gemma 3: masks built before the decoder, sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmfast.adapters.alignment import is_plain
from mmfast.adapters.base import Adapter, family


@family("paligemma")
class PaliGemma(Adapter):
    """One square grid per image at the head of the prompt, attended to in both directions."""

    masks_before_decoder = True
    reads_both_ways = True
    merges_in_encoder = True

    def patches_per_side(self, modality: str) -> int | None:
        """A patch is a token."""
        return 1 if is_plain(self.tower(modality)) else None

    def projectable(self, modality: str, arguments: Mapping[str, Any]) -> bool:
        """The projector sees single patches."""
        return True

    def project(self, features: Tensor) -> Tensor:
        """The norm at the end of the vision encoder comes before the projector."""
        return super().project(self.tower("image").post_layernorm(features.to(self.model.dtype)))


@family("gemma3")
class Gemma3(Adapter):
    """Square grids; most layers look through a sliding window measured in original positions."""

    masks_before_decoder = True

    def patches_per_side(self, modality: str) -> int | None:
        """Squares of patches are averaged."""
        return int(self.base.multi_modal_projector.kernel_size) if is_plain(self.tower(modality)) else None

    def rotary(self, layer: nn.Module, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Sliding and full layers have tables of their own."""
        attention: Any = self.attention(layer)
        tables: tuple[Tensor, Tensor] = self.decoder.rotary_emb(hidden, position_ids, attention.layer_type)
        return tables
