"""HiMAP: both scores, what is kept in both steps, and the positions."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from support.attention import DenseAttention


def check(case: dict[str, np.ndarray]) -> None:
    """Run the two steps one after the other."""
    start, visual = int(case["image_start"]), int(case["image_len"])
    kept_counts = (int(case["keep_txt"]), int(case["keep_img"]))
    method = get("himap").method()
    length = case["attn_txt_layer"].shape[-1]
    positions, alive, origin = torch.arange(length), visual, torch.arange(visual)
    for step, (attention, score, index) in enumerate(
        (("attn_txt_layer", "score_txt", "keep_index_1"), ("attn_img_layer", "score_img", "keep_index_2"))
    ):
        weights = torch.from_numpy(case[attention])[0]
        candidates = torch.arange(start, start + alive)
        tokens = LayerTokens(
            hidden=torch.zeros(weights.shape[-1], 1),
            candidates=candidates,
            origin=origin,
            media=torch.zeros_like(candidates),
            total=visual,
            media_totals=(visual,),
            attention=DenseAttention.of(weights),
        )
        event = LayerEvent(2 if step == 0 else 8, step, 32)
        np.testing.assert_allclose(method.score(tokens, event).numpy(), case[score], rtol=1e-4, atol=1e-5)
        chosen = method.choose(tokens, kept_counts[step], event)
        text = torch.tensor([p for p in range(weights.shape[-1]) if not start <= p < start + alive])
        keep = torch.cat([candidates[chosen], text]).sort().values
        np.testing.assert_array_equal(keep.numpy(), case[index])
        positions, alive, origin = positions[keep], kept_counts[step], origin[chosen]
    np.testing.assert_array_equal(positions.numpy(), case["position_ids_2"])
    # The published setting keeps half, then an eighth.
    published = method.counts(visual, 32)
    if kept_counts == (visual // 2, visual // 8):
        assert published == list(kept_counts)
