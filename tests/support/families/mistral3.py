"""Mistral 3: native sizes; the break after each row of patches is text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from mmfast.tokens import Layout
from support.families.base import HEADS, HIDDEN, Family, pixels, text_config, vision_config
from support.prompts import BREAK, END, IMAGE, Media

PATCH, MERGE = 4, 2
SIZES = ((4, 5), (3, 4))
"""Rows and columns of tokens."""


class Mistral3(Family):
    name, model_class = "mistral3", "Mistral3ForConditionalGeneration"
    sizes = 2

    def config(self) -> Any:
        return transformers.Mistral3Config(
            text_config=text_config(model_type="mistral", head_dim=HIDDEN // HEADS, sliding_window=None),
            vision_config=vision_config("pixtral", 64, PATCH, layers=2, head_dim=16),
            image_token_index=IMAGE,
            spatial_merge_size=MERGE,
            tie_word_embeddings=False,
        )

    def image(self, size: int = 0, seed: int = 0) -> Media:
        rows, cols = SIZES[size]
        height, width = rows * MERGE * PATCH, cols * MERGE * PATCH
        return Media(
            "image",
            (*([*[IMAGE] * cols, BREAK] * rows)[:-1], END),
            (Layout.grid(rows, cols),),
            {
                "pixel_values": pixels(1, 3, height, width, seed=seed),
                "image_sizes": torch.tensor([[height, width]]),
            },
        )

    def join(self, rows: Sequence[Sequence[Media]]) -> dict[str, Tensor]:
        # The processor pads to the largest image of the batch.
        shapes = [media.tensors["pixel_values"].shape[-2:] for row in rows for media in row]
        if not shapes:
            return {}
        height, width = (max(sizes) for sizes in zip(*shapes, strict=True))

        def padded(media: Media) -> Media:
            own = media.tensors["pixel_values"]
            return replace(
                media,
                tensors={
                    **media.tensors,
                    "pixel_values": pad(own, (0, width - own.shape[-1], 0, height - own.shape[-2])),
                },
            )

        return super().join([[padded(media) for media in row] for row in rows])
