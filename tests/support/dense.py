"""Attention written out with every logit in double precision, for the tests of what is cleverer."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""dtype -> largest error, relative to the largest number of a result or to 1."""


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with masks over everything; ``visible`` and ``bias`` broadcast to ``[B, H, q, n]``."""
    share = query.shape[1] // key.shape[1]
    keys, values = (states.double().repeat_interleave(share, dim=1) for states in (key, value))
    logits = query.double() @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias.double()
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    return logits.softmax(dim=-1).nan_to_num() @ values, logits.logsumexp(dim=-1)


def assert_near(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Hold outputs and weights against others; the same rows must see nothing."""
    for mine, other in zip(found, wanted, strict=True):
        assert mine.shape == other.shape
        mine, other = mine.double().cpu(), other.double().cpu()
        assert torch.equal(mine.isinf(), other.isinf())
        mine, other = (torch.nan_to_num(states, nan=torch.nan, neginf=0.0) for states in (mine, other))
        largest = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        error = float((mine - other).abs().max()) if other.numel() else 0.0
        assert error <= TOLERANCES[dtype] * largest, f"off by {error}"
