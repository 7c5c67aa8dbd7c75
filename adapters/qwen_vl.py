"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: native resolution, merged patches, three-dimensional positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from mmfast.adapters.base import Adapter, family
from mmfast.tokens import Layout


@family("qwen2_vl", "qwen3_vl", "qwen3_vl_moe")
class QwenVL(Adapter):
    """Grids come with the inputs; positions have a time, a row and a column and stay as they are."""

    can_compact = False
    packs_patches = True
    signals = Adapter.signals | {"video_frames"}

    def patches_per_side(self, modality: str) -> int | None:
        """Squares of patches are merged."""
        return int(self.model.config.vision_config.spatial_merge_size)

    def prompt_positions(self, inputs: Mapping[str, Any], start: int) -> Tensor:
        """Let the model lay out time, rows and columns, ``[3, 1, n]``."""
        known = inspect.signature(self.base.get_rope_index).parameters
        found: Tensor = self.base.get_rope_index(**{name: inputs[name] for name in known if name in inputs})[0]
        return found + start

    def text_positions(self, places: Tensor) -> Tensor:
        """Text has the same time, row and column."""
        return places.expand(3, 1, -1)

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

    def align(
        self, modality: str, arguments: Mapping[str, Any], maps: Tensor, features: Sequence[Tensor]
    ) -> list[Tensor]:
        """Average the patches of each merged token, which follow one another."""
        grids = arguments.get(f"{modality}_grid_thw")
        if grids is None:
            return super().align(modality, arguments, maps, features)
        group = self.model.config.vision_config.spatial_merge_size**2
        merged = self.in_raster_order(maps[0].unflatten(0, (-1, group)).mean(dim=1), grids)
        return list(merged.split([int(grid.prod()) // group for grid in grids]))

    def in_raster_order(self, merged: Tensor, grids: Tensor) -> Tensor:
        """Put merged tokens ``[n, C]`` into the order in which the vision encoder returns them."""
        return merged


@family("qwen2_5_vl")
class Qwen25VL(QwenVL):
    """Most blocks of the vision encoder attend in windows, for which it sorts the patches anew.

    Attention is read of blocks that see whole images: of the block asked for, else of the nearest such
    block before it, else of the first.
    """

    def attention_block(self, modality: str, block: int) -> int:
        """Return the nearest block without windows."""
        full = sorted(self.model.config.vision_config.fullatt_block_indexes)
        before = [index for index in full if index <= block]
        return int(before[-1] if before else full[0]) if full else block

    def in_raster_order(self, merged: Tensor, grids: Tensor) -> Tensor:
        """Undo the sorting into windows."""
        vision = self.model.config.vision_config
        index, _ = get_vision_window_index(grids, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        return merged[index.argsort().to(merged.device)]
