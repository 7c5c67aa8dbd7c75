"""LLaVA-NeXT and LLaVA-NeXT-Video: AnyRes tiles with newline tokens, pooled video frames."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from mmfast.adapters.alignment import pool_grid
from mmfast.adapters.base import Adapter, family, packed_layout, square_or_unknown
from mmfast.tokens import Layout


@family("llava_next")
class LlavaNext(Adapter):
    """Tile 0 is the whole image, then the crops in raster order with one newline token per row."""

    def layouts(self, modality: str, arguments: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Send coordinates through the model's own packing, which unpads and adds newlines."""
        if modality == "video":
            return self.video_layouts(arguments, features)
        found = []
        for size, item in zip(arguments["image_sizes"], features, strict=False):
            packed, crops = self._packed(size, len(item), arguments)
            known = len(packed) == len(item)
            found.append(packed_layout(packed, crops, self._side) if known else Layout.unknown(len(item)))
        return found

    def align(
        self, modality: str, arguments: Mapping[str, Any], maps: Tensor, features: Sequence[Tensor]
    ) -> list[Tensor]:
        """Send the maps through the model's own packing; newline tokens get zeros."""
        if modality == "video":
            return self.align_videos(arguments, maps)
        found, start = [], 0
        for size, item in zip(arguments["image_sizes"], features, strict=False):
            _, (high, wide) = self._packed(size, len(item), arguments)
            stop = start + 1 + high * wide
            if stop > len(maps):
                raise ValueError(f"{len(maps)} tiles of the vision encoder are too few for {len(features)} images")
            found.append(self._pack(maps[start:stop], size, arguments))
            start = stop
        return found

    def align_videos(self, arguments: Mapping[str, Any], maps: Tensor) -> list[Tensor]:
        """Align the frames of videos; families without video never get here."""
        return list(maps.unflatten(0, (-1, frames_per_video(arguments))).flatten(1, 2))

    def projectable(self, modality: str, arguments: Mapping[str, Any]) -> bool:
        """The projector sees single patches, unless it joins the features of several blocks."""
        return len(self.feature_layers(arguments)) == 1

    @property
    def _side(self) -> int:
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def _packed(self, size: Any, count: int, arguments: Mapping[str, Any]) -> tuple[Tensor, tuple[int, int]]:
        """Return coordinates packed as an image of ``count`` tokens was, and rows and columns of its crops."""
        config = self.model.config
        high, wide = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        tiles = _coordinates(high, wide, self._side)
        packed = self._pack(tiles, size, arguments)
        if len(packed) == count:
            return packed, (high, wide)
        # The model packs a single tile when its processor made only one.
        return self._pack(tiles[:1], size, arguments), (0, 0)

    def video_layouts(self, arguments: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Lay out videos; families without video never get here."""
        return [Layout.unknown(len(item), "video") for item in features]

    def _pack(self, tiles: Tensor, size: Any, arguments: Mapping[str, Any]) -> Tensor:
        pack = self.base.pack_image_features
        accepted = inspect.signature(pack).parameters
        own: dict[str, Any] = {
            "image_features": [tiles],
            "image_sizes": torch.as_tensor(size)[None],
            "image_newline": torch.zeros(tiles.shape[-1]) if self._has_newline() else None,
        }
        if "vision_feature_select_strategy" in accepted:
            own["vision_feature_select_strategy"] = "full"
        if "vision_aspect_ratio" in accepted:
            # OneVision shrinks large images to the number of tiles that this names.
            own["vision_aspect_ratio"] = arguments.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        packed: Tensor = pack(**own)[0][0]
        return packed

    def _has_newline(self) -> bool:
        return getattr(self.base, "image_newline", None) is not None


@family("llava_next_video")
class LlavaNextVideo(LlavaNext):
    """Images as in LLaVA-NeXT; each video frame is pooled to a square grid."""

    signals = LlavaNext.signals | {"video_frames"}

    def video_layouts(self, arguments: Mapping[str, Any], features: Sequence[Tensor]) -> list[Layout]:
        """Divide each video evenly over its frames."""
        return video_grids(features, frames_per_video(arguments))

    def align_videos(self, arguments: Mapping[str, Any], maps: Tensor) -> list[Tensor]:
        """Average the patches that are pooled."""
        factor = self.model.config.spatial_pool_stride
        pooled = torch.stack([pool_grid(frame, self._side, self._side, factor) for frame in maps])
        return super().align_videos(arguments, pooled)

    def projectable(self, modality: str, arguments: Mapping[str, Any]) -> bool:
        """Frames that are pooled by other means than averages are not."""
        averaged = modality == "image" or self.model.config.spatial_pool_mode == "average"
        return averaged and super().projectable(modality, arguments)

    def pools_before_projecting(self, modality: str) -> bool:
        """Frames are pooled first."""
        return modality == "video"


def frames_per_video(arguments: Mapping[str, Any]) -> int:
    """Read the number of frames from the pixels ``[videos, frames, 3, H, W]``."""
    # transformers 5.17 calls them as it calls those of images.
    pixels = arguments.get("pixel_values_videos", arguments.get("pixel_values"))
    if pixels is None:
        raise ValueError(f"get_video_features was called without pixels; arguments: {', '.join(arguments)}")
    return int(pixels.shape[1])


def video_grids(features: Sequence[Tensor], frames: int) -> list[Layout]:
    """Lay out videos of equal, square frames.

    Args:
        features: ``[n, D]`` per video.
        frames: frames per video.
    """
    found = []
    for item in features:
        frame = square_or_unknown(len(item) // frames, "video")
        if len(item) % frames or not frame.grid_known:
            found.append(Layout.unknown(len(item), "video"))
            continue
        side = int(frame.row.max()) + 1
        found.append(Layout.grid(side, side, frames=frames, modality="video"))
    return found


def _coordinates(high: int, wide: int, side: int) -> Tensor:
    """Return ``[1 + high*wide, side*side, 4]``: (1, column, row, is crop) of every token of every tile."""
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    one = torch.ones(side, side)
    tiles = [torch.stack([one, col.float(), row.float(), one * 0], dim=-1)]
    for tile_row in range(high):
        for tile_col in range(wide):
            tiles.append(
                torch.stack([one, (col + tile_col * side).float(), (row + tile_row * side).float(), one], dim=-1)
            )
    return torch.stack(tiles).reshape(1 + high * wide, side * side, 4)
