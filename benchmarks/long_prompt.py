"""A model of random weights and a prompt of 12,544 visual tokens, for benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

LONG_SIDE, TEXT_TOKENS = 112, 64


def long_model(dtype: torch.dtype, *, layers: int, width: int) -> LlavaForConditionalGeneration:
    """Build a model of random weights that makes 12,544 tokens of a picture, with a tower that costs little."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
            image_size=14 * LONG_SIDE, patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=1024, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=16384,
        ),
        image_token_id=1023,
        vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval().to(dtype)


def long_prompt(model: Any) -> dict[str, Tensor]:
    """Make one prompt with a picture and text."""
    generator = torch.Generator().manual_seed(1)
    visual = LONG_SIDE * LONG_SIDE
    ids = torch.randint(3, 1000, (1, visual + TEXT_TOKENS), generator=generator)
    ids[0, 5 : 5 + visual] = model.config.image_token_id
    pixels = torch.randn(1, 3, 14 * LONG_SIDE, 14 * LONG_SIDE, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}


def described(model: Any) -> str:
    text = model.config.text_config
    return (
        f"{text.num_hidden_layers} layers of width {text.hidden_size}, {text.num_key_value_heads} key/value heads of "
        f"64, {str(model.dtype).removeprefix('torch.')}, {text._attn_implementation} attention, batch 1, "
        f"{LONG_SIDE * LONG_SIDE} visual + {TEXT_TOKENS} text tokens, random weights"
    )


def held_bytes(cache: Any) -> int:
    """Add up every tensor that can be reached from a cache, each storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = list(cache.layers)
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif hasattr(item, "__dict__"):
            waiting += vars(item).values()
    return sum(storages.values())
