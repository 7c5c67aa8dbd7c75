"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: tiles of an image with a newline token per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor

from mmfast.tokens import Layout
from support.families.base import Family, pixels, placeholders, text_config, vision_config
from support.prompts import IMAGE, VIDEO, Media, Piece

SIDE, PATCH, FRAMES = 4, 2, 3
TILE = SIDE * PATCH
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]

# (height, width) in pixels -> (tiles, rows and columns of the crops that are left after unpadding).
# 8 x 16 fits its two crops; 12 x 8 is scaled to 16 x 8 with a padding row above and below.
IMAGES = (((8, 16), 3, 4, 8), ((12, 8), 3, 6, 4))


def anyres_layout(rows: int, cols: int) -> Layout:
    """The whole image, then rows of the crops with a newline after each; written out by hand.

    What is missing of the grid of crops is padding, as much above as below and as much left as right.
    """
    whole = Layout.grid(SIDE, SIDE)
    row = torch.arange(rows).repeat_interleave(cols + 1)
    col = torch.cat([torch.arange(cols), torch.tensor([-1])]).repeat(rows)
    count = rows * (cols + 1)
    high, wide = -(-rows // SIDE), -(-cols // SIDE)
    crop = (row + (high * SIDE - rows) // 2) // SIDE * wide + (col + (wide * SIDE - cols) // 2) // SIDE
    return Layout(
        "image",
        torch.zeros(SIDE * SIDE + count, dtype=torch.int64),
        torch.cat([whole.tile, torch.ones(count, dtype=torch.int64)]),
        torch.cat([whole.row, row]),
        torch.cat([whole.col, col]),
        torch.cat([whole.is_newline, col == -1]),
        crop=torch.cat([torch.full_like(whole.tile, -1), crop.masked_fill(col == -1, -1)]),
        crop_grid=(high, wide),
    )


class LlavaNext(Family):
    name, model_class = "llava_next", "LlavaNextForConditionalGeneration"
    sizes = 2

    def config(self) -> Any:
        return transformers.LlavaNextConfig(
            text_config=text_config(model_type="llama"),
            vision_config=vision_config("clip_vision_model", TILE, PATCH),
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
        )

    def image(self, size: int = 0, seed: int = 0) -> Media:
        measures, tiles, rows, cols = IMAGES[size]
        layout = anyres_layout(rows, cols)
        return Media(
            "image",
            placeholders("image", len(layout)),
            (layout,),
            {
                "pixel_values": pixels(1, tiles, 3, TILE, TILE, seed=seed),
                "image_sizes": torch.tensor([measures]),
            },
        )


class LlavaNextVideo(LlavaNext):
    """Each frame is pooled to half its side."""

    name, model_class = "llava_next_video", "LlavaNextVideoForConditionalGeneration"
    has_video = True

    def config(self) -> Any:
        return transformers.LlavaNextVideoConfig(
            text_config=text_config(model_type="llama"),
            vision_config=vision_config("clip_vision_model", TILE, PATCH),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
        )

    def video(self, seed: int = 0, frames: int | None = None) -> Media:
        frames = frames or FRAMES
        layout = Layout.grid(SIDE // 2, SIDE // 2, frames=frames, modality="video")
        return Media(
            "video",
            placeholders("video", len(layout)),
            (layout,),
            {"pixel_values_videos": pixels(1, frames, 3, TILE, TILE, seed=seed)},
        )


class LlavaOnevision(LlavaNext):
    """Several images in one prompt are encoded as one tile each, a video ends in one newline."""

    name, model_class = "llava_onevision", "LlavaOnevisionForConditionalGeneration"
    has_video = True

    def config(self) -> Any:
        return transformers.LlavaOnevisionConfig(
            text_config=text_config(model_type="qwen2", use_sliding_window=False),
            vision_config=vision_config("siglip_vision_model", TILE, PATCH, vision_use_head=False),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
        )

    def video(self, seed: int = 0, frames: int | None = None) -> Media:
        frames = frames or FRAMES
        layout = Layout.grid(SIDE // 2, SIDE // 2, frames=frames, modality="video").with_newline()
        return Media(
            "video",
            placeholders("video", len(layout)),
            (layout,),
            {"pixel_values_videos": pixels(1, frames, 3, TILE, TILE, seed=seed)},
        )

    def settle(self, row: Sequence[Piece]) -> list[Piece]:
        images = [piece for piece in row if isinstance(piece, Media) and piece.modality == "image"]
        return [_single_tile(piece) if len(images) > 1 and piece in images else piece for piece in row]

    def join(self, rows: Sequence[Sequence[Media]]) -> dict[str, Tensor]:
        counts = [sum(media.modality == "image" for media in row) for row in rows]
        tiles = [media.tensors["pixel_values"].shape[1] for row in rows for media in row if media.modality == "image"]
        if not tiles:
            return super().join(rows)
        joined = super().join([[_filled(media, max(tiles)) for media in row] for row in rows])
        # Images of several turns are all cut into tiles, which is what leaving the numbers out means.
        return joined if min(tiles) > 1 else {**joined, "batch_num_images": torch.tensor(counts)}


def _single_tile(media: Media) -> Media:
    """Encode an image that shares its prompt with others as the whole image alone."""
    layout = Layout.grid(SIDE, SIDE).with_newline()
    tensors = {**media.tensors, "pixel_values": media.tensors["pixel_values"][:, :1]}
    return Media("image", placeholders("image", len(layout)), (layout,), tensors)


def _filled(media: Media, tiles: int) -> Media:
    """Fill up with empty tiles, as the processor does."""
    if media.modality != "image":
        return media
    own = media.tensors["pixel_values"]
    empty = own.new_zeros(1, tiles - own.shape[1], *own.shape[2:])
    return replace(media, tensors={**media.tensors, "pixel_values": torch.cat([own, empty], dim=1)})
