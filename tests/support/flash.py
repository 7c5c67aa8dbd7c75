"""A stand-in for flash attention on the CPU: the same two-dimensional masks, the same traps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FLASH = "flash_on_cpu"


@contextmanager
def flash_on_cpu() -> Iterator[str]:
    """Register the stand-in; its name makes transformers treat it as it treats flash attention."""
    ALL_ATTENTION_FUNCTIONS.register(FLASH, flash_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(FLASH, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    try:
        yield FLASH
    finally:
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._global_mapping.pop(FLASH)


def flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as flash attention does: causal from the right, windows over what is stored, packed sequences."""
    batch, _, length, _ = query.shape
    total = key.shape[2]
    causal = module.is_causal if is_causal is None else is_causal
    visible = torch.ones(1, 1, length, total, dtype=torch.bool)
    if causal and length > 1:
        visible = visible.tril(total - length)
    if sliding_window is not None:
        visible = visible & ~visible.new_ones(1, 1, length, total).tril(total - length - sliding_window)
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape != (batch, total):
            raise ValueError(f"flash attention reads masks of shape {(batch, total)}, got {attention_mask.shape}")
        visible = visible & attention_mask.bool()[:, None, None, :]
    elif _packed(position_ids, batch):
        sequence = (position_ids == 0).cumsum(-1) if length == total else None
        if sequence is None:
            raise ValueError("packed sequences cannot continue a cache")
        visible = visible & (sequence[:, None, :, None] == sequence[:, None, None, :])
        gaps = torch.cat([position_ids.new_zeros(batch, 1), position_ids.diff() != 1], dim=1).cumsum(-1)
        visible = visible & (gaps[:, None, :, None] == gaps[:, None, None, :])
    # Rows of padding see nothing; what comes out of them is never read.
    blind = ~visible.any(dim=-1, keepdim=True)
    groups = query.shape[1] // key.shape[1]
    out = scaled_dot_product_attention(
        query,
        key.repeat_interleave(groups, dim=1),
        value.repeat_interleave(groups, dim=1),
        attn_mask=visible | blind,
        scale=scaling,
    )
    return out.transpose(1, 2), None


def _packed(position_ids: Tensor | None, batch: int) -> bool:
    """Positions with gaps in a single row mean sequences laid end to end."""
    if position_ids is None or batch != 1 or position_ids.shape[-1] == 1:
        return False
    return bool((position_ids.diff() != 1).any())
