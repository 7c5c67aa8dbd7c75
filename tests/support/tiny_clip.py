"""A tiny CLIP model, and the tokenizer of a vision-language model beside it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from support.families.base import SPREAD

LETTERS = "abcdefghijklmnopqrstuvwxyz?"
WORDS, WIDTH, EMBED = 12, 32, 24


def save(folder: Path, width: int = WIDTH) -> Path:
    """Write a tiny CLIP model with a tokenizer of single letters."""
    vocabulary = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    sizes = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **sizes,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": WORDS + 2,
            "bos_token_id": len(vocabulary) - 2,
            "eos_token_id": len(vocabulary) - 1,
        },
        vision_config={**sizes, "image_size": 20, "patch_size": 4},
        projection_dim=EMBED,
    )
    model = transformers.CLIPModel(config)
    generator = torch.Generator().manual_seed(width)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            weight.copy_(torch.randn(weight.shape, generator=generator) * SPREAD)
    model.save_pretrained(folder)
    return folder


class Letters:
    """The tokenizer of a vision-language model: one letter per token, of which those from 110 on are special."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(LETTERS[token % 26] for token in ids if 2 < token < 110)
