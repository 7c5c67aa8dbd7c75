"""Key re-rotation: survivors move together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mmfast.kernels.rerotate import rerotate
from mmfast.kv.base import Adjuster
from mmfast.kv.entries import Entries, Retained
from mmfast.registry import register


@register("key_rerotation", stage="cache", paper="arXiv 2408.00167", source="NVIDIA/kvpress", vectors=True)
@dataclass(frozen=True)
class KeyRerotation(Adjuster):
    """Turn the keys that stay to positions 0, 1, ... without gaps, in each head for itself.

    For prompts longer than what the model was trained on. The new position of an entry is its rank among those its
    head keeps, and tokens that follow are numbered on from there. Models whose positions have several dimensions,
    such as Qwen2-VL, are refused. Used with a method that drops, such as ``knorm() + key_rerotation()``.

    Paper: "FINCH: Prompt-guided Key-Value Cache Compression", TACL 2024.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rotation"})
    compacts: ClassVar[bool] = True

    def adjust(self, entries: Entries, retained: Retained) -> Retained:
        """Return the same choice with keys at their new positions."""
        if entries.rotation is None:
            raise RuntimeError('a method that moves keys must name "rotation" in needs')
        keys = entries.keys if retained.keys is None else retained.keys
        kept = retained.by_head(entries.heads)
        cos, sin = entries.rotation.at(torch.arange(len(entries), device=keys.device))
        # Entries that go are turned somewhere too; nobody looks at them.
        rank = (kept.cumsum(dim=-1) - 1).clamp_min(0)
        moved = rerotate(keys[None], (entries.rotation.cos, entries.rotation.sin), (cos, sin), rank[None])
        return replace(retained, keys=moved[0])
