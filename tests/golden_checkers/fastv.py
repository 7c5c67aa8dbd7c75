"""FastV: scores, kept positions and tokens per layer."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.layers import LayerTokens
from support.attention import DenseAttention


def check(case: dict[str, np.ndarray]) -> None:
    """Feed the attention of layer K-1 and compare what enters layer K."""
    start, visual = int(case["image_start"]), int(case["image_len"])
    hidden = torch.from_numpy(case["hidden_states"])[0]
    length, layer = hidden.shape[0], int(case["k_layer"])
    method = get("fastv").method(keep=1.0 - float(case["r"]), layer=layer)
    depth = len(case["tokens_per_layer"])
    (event,) = method.events(depth)
    assert event.layer == layer
    candidates = torch.arange(start, start + visual)
    tokens = LayerTokens(
        hidden=hidden,
        candidates=candidates,
        origin=candidates - start,
        media=torch.zeros_like(candidates),
        total=visual,
        media_totals=(visual,),
        attention=DenseAttention.of(torch.from_numpy(case["attention"])[0]),
    )
    np.testing.assert_allclose(method.score(tokens, event).numpy(), case["score"], rtol=1e-4, atol=1e-5)
    decision = method(tokens, event)
    kept = candidates if decision is None else candidates[decision.indices]
    assert kept.numel() == int(case["n_keep"])
    text = torch.tensor([place for place in range(length) if not start <= place < start + visual])
    keep_index = torch.cat([kept, text]).sort().values
    np.testing.assert_array_equal(keep_index.numpy(), case["keep_index"])
    np.testing.assert_allclose(hidden[keep_index].numpy(), case["out_hidden"][0], rtol=1e-4, atol=1e-5)
    assert keep_index.numel() == int(case["mask_len"])
    predicted = method.keep_counts(visual, length - visual, depth)
    np.testing.assert_array_equal(predicted, case["tokens_per_layer"])
