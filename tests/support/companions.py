"""Second models that draft, for tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

from support.families import FAMILIES, Family
from support.prompts import VOCABULARY

CHOSEN = [FAMILIES[name] for name in ("llava", "qwen2_5_vl", "gemma3", "internvl")]


def clone(family: Family) -> Any:
    """A model that says the same, and is another."""
    return copy.deepcopy(family.model())


def other(family: Family, amount: float = 0.02) -> Any:
    """A model that mostly says the same."""
    model, chance = clone(family), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight += amount * torch.randn(weight.shape, generator=chance)
    return model


def language_model(vocabulary: int = VOCABULARY, seed: int = 0, **changes: Any) -> Any:
    """A small random language model."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        **changes,
    )
    return transformers.LlamaForCausalLM(config).eval()
