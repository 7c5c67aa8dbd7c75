"""Random heads of every trained drafter, and the prompts they are tried on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmfast.speculative.heads.base import HeadConfig
from mmfast.speculative.heads.feature import CompressedHead, FeatureHead
from mmfast.speculative.heads.static import HydraHeads, LatentHead, MedusaHeads

WIDTH, VOCABULARY = 16, 24
SIZES = {
    "hidden_size": WIDTH,
    "vocab_size": VOCABULARY,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
}
CONFIG = HeadConfig.read(SIZES, WIDTH)
TURNED = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 1, 1]}}

HEADS: dict[str, Callable[[], nn.Module]] = {
    "msd": lambda: FeatureHead(CONFIG),
    "msd-qwen": lambda: FeatureHead(CONFIG, bias=True, fc_bias=False),
    "msd-2layers": lambda: FeatureHead(replace(CONFIG, layers=2)),
    "vispec": lambda: CompressedHead(CONFIG),
    "vispec-4queries": lambda: CompressedHead(CONFIG, queries=4, bias=True),
    "medusa": lambda: MedusaHeads(WIDTH, 4, 2, VOCABULARY),
    "medusa-shared": lambda: MedusaHeads(WIDTH, 3),
    "hydra": lambda: HydraHeads(CONFIG, 4, 2, VOCABULARY),
    "hydra-plain": lambda: HydraHeads(CONFIG, 3, 3, prefix=False),
    "flash": lambda: LatentHead(CONFIG, queries=3, steps=4),
}
STREAMS = [name for name in HEADS if not name.startswith("medusa")]
PROMPTS: dict[str, list[int | tuple[int, int]]] = {
    "text": [6],
    "one": [3, (0, 6), 4],
    "two": [2, (0, 5), 2, (1, 7), 3],
    "side by side": [2, (0, 4), (1, 4), 1],
    "first": [(0, 4), 3],
    "last": [3, (0, 4)],
    "single token": [1],
    "tiny image": [2, (0, 1), 2],
    "frames": [2, (0, 4), 1, (0, 4), 2, (1, 4), 2],
}


def write(folder: Path, head: nn.Module, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(head.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_head(name: str) -> nn.Module:
    """A head none of whose parameters is zero, or small enough not to matter."""
    torch.manual_seed(len(name))
    head = HEADS[name]()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return head


everything = pytest.mark.parametrize("drafter", HEADS, indirect=True)
streams = pytest.mark.parametrize("drafter", STREAMS, indirect=True)
each_prompt = pytest.mark.parametrize("parts", PROMPTS.values(), ids=PROMPTS.keys())
each_rows = pytest.mark.parametrize("rows", [1, 3], ids=["rows1", "rows3"])
