"""InternVL, Idefics3 and SmolVLM: images cut into square tiles, each encoded by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from mmfast.tokens import Layout
from support.families.base import Family, pixels, placeholders, text_config, vision_config
from support.prompts import BEGIN, END, IMAGE, TAG, Media

SIDE = 4
"""Tokens per side of a tile, after two by two patches became one token."""
PIXELS = 16
TILES = (1, 3)
"""Tiles of the image sizes; the last of several is the whole image."""


class InternVL(Family):
    """All tiles of an image stand in one run of placeholders."""

    name, model_class = "internvl", "InternVLForConditionalGeneration"
    sizes = 2

    def config(self) -> Any:
        return transformers.InternVLConfig(
            text_config=text_config(model_type="qwen2", use_sliding_window=False),
            vision_config={
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "image_size": [PIXELS, PIXELS],
                "patch_size": [PIXELS // (2 * SIDE)] * 2,
            },
            image_token_id=IMAGE,
            image_seq_length=SIDE**2,
            tie_word_embeddings=False,
        )

    def image(self, size: int = 0, seed: int = 0) -> Media:
        tiles = TILES[size]
        return Media(
            "image",
            (BEGIN, *placeholders("image", tiles * SIDE**2), END),
            (Layout.grid(SIDE, SIDE),) * tiles,
            {"pixel_values": pixels(tiles, 3, PIXELS, PIXELS, seed=seed)},
        )


class Idefics3(Family):
    """A tag that is text stands before each tile; rows with fewer tiles are filled up with black ones."""

    name, model_class = "idefics3", "Idefics3ForConditionalGeneration"
    sizes = 2

    def config(self) -> Any:
        return transformers.Idefics3Config(**self.arguments("llama", "idefics3_vision"))

    def arguments(self, language: str, vision: str) -> dict[str, Any]:
        """Return the arguments of the configuration."""
        return {
            "text_config": text_config(model_type=language),
            "vision_config": vision_config(vision, PIXELS, PIXELS // (2 * SIDE), layers=2),
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": 0,
        }

    def image(self, size: int = 0, seed: int = 0) -> Media:
        tiles = TILES[size]
        ids: list[int] = []
        for _ in range(tiles):
            ids += [BEGIN, TAG, *placeholders("image", SIDE**2)]
        return Media(
            "image",
            (*ids, END),
            (Layout.grid(SIDE, SIDE),) * tiles,
            {"pixel_values": pixels(tiles, 3, PIXELS, PIXELS, seed=seed)},
        )

    def join(self, rows: Sequence[Sequence[Media]]) -> dict[str, Tensor]:
        own = [[media.tensors["pixel_values"] for media in row] for row in rows]
        most = max(sum(len(tiles) for tiles in row) for row in own)
        if most == 0:
            return {}
        empty = torch.zeros(most, 3, PIXELS, PIXELS)
        return {"pixel_values": torch.stack([torch.cat([*row, empty])[:most] for row in own])}


class SmolVLM(Idefics3):
    name, model_class = "smolvlm", "SmolVLMForConditionalGeneration"

    def config(self) -> Any:
        return transformers.SmolVLMConfig(**self.arguments("llama", "smolvlm_vision"))
