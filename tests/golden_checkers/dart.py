"""DART: key sizes, pivots, the order in which they choose, and what is kept."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.in_llm.dart import key_sizes, largest, least_alike, processing_order
from mmfast.token_pruning.layers import LayerEvent, LayerTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Run the whole choice with official counts and order."""
    start, visual = int(case["image_start"]), int(case["image_len"])
    hidden, key = torch.from_numpy(case["hidden_after_norm"])[0], torch.from_numpy(case["key_states"])[0]
    length = hidden.shape[0]
    candidates, after = torch.arange(start, start + visual), torch.arange(start + visual, length)
    sizes = key_sizes(key)
    np.testing.assert_allclose(_as_official(sizes[candidates], case["image_k_l1"]), case["image_k_l1"], rtol=1e-4)
    np.testing.assert_allclose(_as_official(sizes[after], case["text_k_l1"]), case["text_k_l1"], rtol=1e-4)
    pivots = largest(sizes, candidates, int(case["pivot_image"])), largest(sizes, after, int(case["pivot_text"]))
    np.testing.assert_array_equal(pivots[0].numpy(), case["pivot_image_idx"])
    np.testing.assert_array_equal(pivots[1].numpy(), case["pivot_text_idx"])
    order = processing_order(pivots[0].tolist(), pivots[1].tolist(), "official")
    assert order == case["pivot_processing_order"].tolist()
    budget = int(case["max_num_trunction"])
    keep = budget if budget > 0 else 1.0 - float(case["reduction_ratio"])
    method = get("dart").method(
        keep=keep,
        visual_pivots=int(case["pivot_image"]),
        text_pivots=int(case["pivot_text"]),
        order="official",
        compat="official",
    )
    retained = case["retained_image_index_sorted"]
    (count,) = method.counts(visual, 32)
    assert count == len(retained)
    assert count == len(order) * int(case["per_pivot_k"]) + len(pivots[0]) or count == visual
    tokens = LayerTokens(
        hidden=hidden,
        candidates=candidates,
        origin=candidates - start,
        media=torch.zeros_like(candidates),
        total=visual,
        media_totals=(visual,),
        attention=AttentionView(torch.zeros(key.shape[0], length, key.shape[2]), key),
        normed=hidden,
    )
    kept = candidates[method.choose(tokens, count, LayerEvent(2, 0, 32))]
    np.testing.assert_array_equal(kept.numpy(), retained)
    text = torch.cat([torch.arange(start), after])
    np.testing.assert_array_equal(torch.cat([kept, text]).sort().values.numpy(), case["keep_index"])
    taken = least_alike(hidden, candidates, pivots[0], order, count - len(pivots[0]))
    assert taken.unique().numel() == taken.numel()


def _as_official(sizes: torch.Tensor, official: np.ndarray) -> np.ndarray:
    """The LLaVA variant adds up keys repeated over grouped heads: the same ranking, times the repeats."""
    ours = sizes.numpy()
    repeats = round(float(official.sum() / ours.sum()))
    assert repeats >= 1
    return ours * repeats
