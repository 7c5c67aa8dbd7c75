"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: native resolution, merged patches, three-dimensional positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmfast.adapters.base import Adapter, family
from mmfast.tokens import Layout


@family("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
class QwenVL(Adapter):
    """Grids come with the inputs; positions have a time, a row and a column and stay as they are."""

    can_compact = False

    def layouts(self, modality: str, arguments: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Read the grids, in patches before merging, from the arguments."""
        # Qwen3-VL's video entry calls its image entry, whose argument has the image's name.
        grids = arguments.get(f"{modality}_grid_thw")
        if grids is None:
            return super().layouts(modality, arguments, features)
        merge = self.model.config.vision_config.spatial_merge_size
        return [
            Layout.grid(height // merge, width // merge, frames=time, modality=modality)
            for time, height, width in grids.tolist()
        ]
