"""PruMerge and PruMerge+: attention, choice and merged features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.before_llm.prumerge import add_neighbours, outlier_count, sum_of_dropped
from mmfast.token_pruning.similarity import highest_first, outlier_share
from mmfast.tokens import Layout, VisualTokens

TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}


def check(case: dict[str, np.ndarray], name: str = "prumerge") -> None:
    """Check each image: the attention, the tokens picked in order, the features; then the method as it runs."""
    attention = torch.stack([_class_token_row(*pair) for pair in zip(case["queries"], case["keys"], strict=True)])
    np.testing.assert_allclose(attention.numpy(), case["cls_attention"], atol=1e-5, rtol=1e-5)
    for row, own in enumerate(attention):
        features, keys = torch.from_numpy(case["features"][row]), torch.from_numpy(case["keys"][row][1:])
        total = features.shape[0]
        own_rule = bool(case["adaptive"]) and len(attention) == 1
        method = get(name).method(keep=None, compat="official")
        if own_rule:
            # Where nothing stands out we keep one token all the same.
            picks = method.outliers(own) if outlier_count(own) > 0 else torch.empty(0, dtype=torch.int64)
        else:
            assert name == "prumerge", "for a batch or a fixed share the official code of PruMerge+ repeats tokens"
            # The official share of outliers is that of the whole batch.
            share = outlier_share(attention) if bool(case["adaptive"]) else float(case["ratio"])
            picks = highest_first(own, int(total * share))
        np.testing.assert_array_equal(picks.numpy(), case["keep_idx"][row])
        merged = add_neighbours(features, keys, own, picks)
        last = sum_of_dropped(features, own, picks)[None]
        np.testing.assert_allclose(torch.cat([merged, last]).numpy(), case["out_features"][row], **TOLERANCE)
        kept = picks.numel() + 1
        if kept == 1 or kept >= total:
            continue
        signals = {"cls_attention": own, "keys": keys, "patch_features": features}
        tokens = VisualTokens(torch.zeros(total, 3), Layout.unknown(total), signals=signals, projectable=True)
        method = method if own_rule else get(name).method(keep=kept, compat="official")
        decision = method(tokens)
        assert decision is not None
        assert len(decision) == kept
        assert bool(torch.isin(picks, decision.indices).all())
        np.testing.assert_allclose(decision.features.numpy(), case["out_features"][row], **TOLERANCE)


def _class_token_row(queries: np.ndarray, keys: np.ndarray) -> Tensor:
    """Attention of the class token to the patches, all heads taken as one of full width."""
    everything = torch.ones(len(keys), len(keys), dtype=torch.bool)
    view = AttentionView(torch.from_numpy(queries)[None], torch.from_numpy(keys)[None], mask=everything)
    return view.rows(torch.tensor([0]))[0, 0, 1:]
