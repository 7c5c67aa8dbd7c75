"""PaliGemma and Gemma 3: masks made before the decoder, images that are read in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor

from mmfast.tokens import Layout
from support.families.base import HEADS, HIDDEN, Family, pixels, placeholders, text_config, vision_config
from support.prompts import BEGIN, END, IMAGE, Media, Piece, left_padded

SIDE = 4
WINDOW = 8
"""Sliding window of Gemma 3, shorter than every prompt with an image."""


class PaliGemma(Family):
    """Images stand at the head of the prompt; the whole prompt is read in both directions."""

    name, model_class = "paligemma", "PaliGemmaForConditionalGeneration"

    def config(self) -> Any:
        return transformers.PaliGemmaConfig(
            text_config=text_config(model_type="gemma", head_dim=HIDDEN // HEADS),
            vision_config=vision_config("siglip_vision_model", 4 * SIDE, 4, layers=2, vision_use_head=False),
            image_token_index=IMAGE,
            projection_dim=HIDDEN,
            tie_word_embeddings=False,
        )

    def image(self, size: int = 0, seed: int = 0) -> Media:
        return Media(
            "image",
            placeholders("image", SIDE**2),
            (Layout.grid(SIDE, SIDE),),
            {"pixel_values": pixels(1, 3, 4 * SIDE, 4 * SIDE, seed=seed)},
        )

    def settle(self, row: Sequence[Piece]) -> list[Piece]:
        return sorted(row, key=lambda piece: not isinstance(piece, Media))

    def token_inputs(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return {"token_type_ids": left_padded([[0] * len(row) for row in rows])}


class Gemma3(Family):
    """Three layers in five look through a sliding window."""

    name, model_class = "gemma3", "Gemma3ForConditionalGeneration"
    renumbers = False
    window = WINDOW

    def config(self) -> Any:
        sliding, full = "sliding_attention", "full_attention"
        return transformers.Gemma3Config(
            text_config=text_config(
                model_type="gemma3_text",
                head_dim=HIDDEN // HEADS,
                query_pre_attn_scalar=HIDDEN // HEADS,
                sliding_window=WINDOW,
                layer_types=[sliding, sliding, full, sliding, full],
            ),
            vision_config=vision_config("siglip_vision_model", 8 * SIDE, 4, layers=2, vision_use_head=False),
            image_token_index=IMAGE,
            boi_token_index=BEGIN,
            eoi_token_index=END,
            mm_tokens_per_image=SIDE**2,
            tie_word_embeddings=False,
        )

    def image(self, size: int = 0, seed: int = 0) -> Media:
        return Media(
            "image",
            (BEGIN, *placeholders("image", SIDE**2), END),
            (Layout.grid(SIDE, SIDE),),
            {"pixel_values": pixels(1, 3, 8 * SIDE, 8 * SIDE, seed=seed)},
        )

    def token_inputs(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return {"token_type_ids": left_padded([[int(token == IMAGE) for token in row] for row in rows])}
