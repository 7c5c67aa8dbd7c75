"""LLaVA 1.5 and VipLLaVA: one square grid per image, no special tokens inside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmfast.adapters.base import Adapter, family


@family("llava", "vipllava")
class Llava(Adapter):
    """The plain case: everything is as the base class expects."""

    def sequences(self, modality: str, arguments: Mapping[str, Any]) -> list[int] | None:
        """Only encoders that pack images of native size, as Pixtral's, are told their sizes."""
        sizes, patch = arguments.get("image_sizes"), getattr(self.tower(modality), "patch_size", None)
        if sizes is None or not isinstance(patch, int):
            return None
        return [(int(height) // patch) * (int(width) // patch) for height, width in sizes]

    def projectable(self, modality: str, arguments: Mapping[str, Any]) -> bool:
        """VipLLaVA joins the features of several blocks; where it is one, the projector sees single patches."""
        return len(self.feature_layers(arguments)) == 1
