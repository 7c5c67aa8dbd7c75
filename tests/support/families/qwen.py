"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: native sizes, positions of three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from mmfast.tokens import Layout
from support.families.base import HIDDEN, Family, pixels, placeholders, text_config
from support.prompts import BEGIN, END, IMAGE, TAG, VIDEO, Media, left_padded

PATCH, MERGE, TEMPORAL = 4, 2, 2
SIZES = ((6, 8), (8, 4))
"""Rows and columns in patches before merging."""
FRAMES, FRAME = 2, (4, 6)
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


class QwenVL(Family):
    sizes = 2
    has_video = True
    renumbers = False
    prefix: str

    def config(self) -> Any:
        return getattr(transformers, f"{self.prefix}Config")(
            text_config=text_config(rope_parameters=dict(ROPE)),
            vision_config={
                "depth": 2,
                "num_heads": 2,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": TEMPORAL,
                **self.vision(),
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=BEGIN,
            vision_end_token_id=END,
            tie_word_embeddings=False,
        )

    def vision(self) -> dict[str, Any]:
        """Return what differs between the towers."""
        raise NotImplementedError

    def image(self, size: int = 0, seed: int = 0) -> Media:
        rows, cols = SIZES[size]
        layout = Layout.grid(rows // MERGE, cols // MERGE)
        return Media(
            "image",
            (BEGIN, *placeholders("image", len(layout)), END),
            (layout,),
            {
                "pixel_values": pixels(rows * cols, 3 * TEMPORAL * PATCH**2, seed=seed),
                "image_grid_thw": torch.tensor([[1, rows, cols]]),
            },
        )

    def video(self, seed: int = 0, frames: int | None = None) -> Media:
        frames = frames or FRAMES
        layout = Layout.grid(FRAME[0] // MERGE, FRAME[1] // MERGE, frames=frames, modality="video")
        return Media(
            "video",
            self.video_ids(len(layout), frames),
            (layout,),
            {
                "pixel_values_videos": pixels(frames * FRAME[0] * FRAME[1], 3 * TEMPORAL * PATCH**2, seed=seed),
                "video_grid_thw": torch.tensor([[frames, *FRAME]]),
            },
        )

    def video_ids(self, count: int, frames: int) -> tuple[int, ...]:
        """Return the tokens of a video."""
        return (BEGIN, *placeholders("video", count), END)

    def token_inputs(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        kinds = {IMAGE: 1, VIDEO: 2}
        return {"mm_token_type_ids": left_padded([[kinds.get(token, 0) for token in row] for row in rows])}


class Qwen2VL(QwenVL):
    name, model_class, prefix = "qwen2_vl", "Qwen2VLForConditionalGeneration", "Qwen2VL"

    def vision(self) -> dict[str, Any]:
        return {"embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}


class Qwen25VL(QwenVL):
    """One block of the tower attends in windows of two by two merged patches."""

    name, model_class, prefix = "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VL"

    def vision(self) -> dict[str, Any]:
        return {
            "hidden_size": 32,
            "out_hidden_size": HIDDEN,
            "intermediate_size": 48,
            "window_size": 2 * MERGE * PATCH,
            "fullatt_block_indexes": [1],
        }


class Qwen3VL(QwenVL):
    """Features of the tower's blocks are added after the first layers; a timestamp precedes each frame."""

    name, model_class, prefix = "qwen3_vl", "Qwen3VLForConditionalGeneration", "Qwen3VL"

    def config(self) -> Any:
        config = super().config()
        config.text_config.head_dim = HIDDEN // config.text_config.num_attention_heads
        return config

    def vision(self) -> dict[str, Any]:
        return {
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }

    def video_ids(self, count: int, frames: int) -> tuple[int, ...]:
        ids: list[int] = []
        for _ in range(frames):
            ids += [TAG, BEGIN, *placeholders("video", count // frames), END]
        return tuple(ids)
