"""FitPrune: both scores, and what one layer keeps."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.in_llm.fitprune import scores
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from support.attention import DenseAttention


def check(case: dict[str, np.ndarray]) -> None:
    """Feed the attention of one layer."""
    start, visual = int(case["image_start"]), int(case["image_len"])
    attention = torch.from_numpy(case["attention"])[0]
    candidates = torch.arange(start, start + visual)
    tokens = LayerTokens(
        hidden=torch.zeros(attention.shape[-1], 1),
        candidates=candidates,
        origin=candidates - start,
        media=torch.zeros_like(candidates),
        total=visual,
        media_totals=(visual,),
        attention=DenseAttention.of(attention),
    )
    own, cross = scores(tokens)
    np.testing.assert_allclose(own.numpy(), case["self_score"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cross.numpy(), case["cross_score"], rtol=1e-4, atol=1e-5)
    method = get("fitprune").method(deletes=(int(case["n_delete"]), 0), deletes_of=visual)
    kept = method(tokens, LayerEvent(1, 0, 2))
    keep = torch.ones(attention.shape[-1], dtype=torch.bool)
    if kept is not None:
        keep[candidates] = False
        keep[candidates[kept.indices]] = True
    np.testing.assert_array_equal(keep.numpy(), case["keep_mask"].astype(bool))
