"""LLaVA 1.5, VipLLaVA and Video-LLaVA: square images, one run of placeholders each."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from mmfast.tokens import Layout
from support.families.base import Family, pixels, placeholders, text_config, vision_config
from support.prompts import IMAGE, VIDEO, Media

_SIDE = 5


class Llava(Family):
    name, model_class = "llava", "LlavaForConditionalGeneration"

    def config(self) -> Any:
        return transformers.LlavaConfig(
            text_config=text_config(model_type="llama"),
            vision_config=vision_config("clip_vision_model", 4 * _SIDE, 4),
            image_token_index=IMAGE,
        )

    def image(self, size: int = 0, seed: int = 0) -> Media:
        return Media(
            "image",
            placeholders("image", _SIDE * _SIDE),
            (Layout.grid(_SIDE, _SIDE),),
            {"pixel_values": pixels(1, 3, 4 * _SIDE, 4 * _SIDE, seed=seed)},
        )


class VipLlava(Llava):
    name, model_class = "vipllava", "VipLlavaForConditionalGeneration"

    def config(self) -> Any:
        return transformers.VipLlavaConfig(
            text_config=text_config(model_type="llama"),
            vision_config=vision_config("clip_vision_model", 4 * _SIDE, 4),
            image_token_index=IMAGE,
            vision_feature_layers=[-2, -1],
        )


class VideoLlava(Family):
    """Frames of a video keep the CLS token of the tower."""

    name, model_class = "video_llava", "VideoLlavaForConditionalGeneration"
    has_video = True
    side, frames = 4, 3

    def config(self) -> Any:
        return transformers.VideoLlavaConfig(
            text_config=text_config(model_type="llama"),
            vision_config=vision_config("clip_vision_model", 4 * self.side, 4),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
        )

    def image(self, size: int = 0, seed: int = 0) -> Media:
        return Media(
            "image",
            placeholders("image", self.side**2),
            (Layout.grid(self.side, self.side),),
            {"pixel_values_images": pixels(1, 3, 4 * self.side, 4 * self.side, seed=seed)},
        )

    def video(self, seed: int = 0, frames: int | None = None) -> Media:
        frames = frames or self.frames
        frame, count = Layout.grid(self.side, self.side), self.side**2 + 1
        cls = torch.tensor([-1])
        layout = Layout(
            "video",
            torch.arange(frames).repeat_interleave(count),
            torch.zeros(frames * count, dtype=torch.int64),
            torch.cat([cls, frame.row]).repeat(frames),
            torch.cat([cls, frame.col]).repeat(frames),
            torch.zeros(frames * count, dtype=torch.bool),
            grid_known=False,
        )
        shape = (1, frames, 3, 4 * self.side, 4 * self.side)
        return Media(
            "video",
            placeholders("video", frames * count),
            (layout,),
            {"pixel_values_videos": pixels(*shape, seed=seed)},
        )
