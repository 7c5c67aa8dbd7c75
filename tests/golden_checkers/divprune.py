"""DivPrune: selection order, kept indices and features."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.divprune import max_min_order
from mmfast.tokens import VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare with the official picks; among duplicated tokens compare the rows picked."""
    features = torch.from_numpy(case["features"])
    total, wanted = features.shape[0], int(case["k"])
    method = get("divprune").method(keep=float(case["ratio"]))
    assert method.keep_count(total) == max(1, wanted)
    order = max_min_order(features, max(1, wanted))
    decision = method(VisualTokens.from_features(features))
    kept = torch.arange(total) if decision is None else decision.indices
    assert kept.numel() == max(1, wanted)
    assert order.sort().values.equal(kept)
    if torch.unique(features, dim=0).shape[0] < total:
        _same_rows(features[kept].numpy(), case["out_features"])
        return
    np.testing.assert_array_equal(order.numpy(), case["selection_order"])
    np.testing.assert_array_equal(kept.numpy(), case["keep_idx"])
    np.testing.assert_allclose(features[kept].numpy(), case["out_features"], atol=1e-5, rtol=1e-5)


def _same_rows(ours: np.ndarray, official: np.ndarray) -> None:
    """The official code may pick a token twice when only duplicates are left; we never do."""
    if len(ours) == len(official):
        np.testing.assert_allclose(ours[np.lexsort(ours.T)], official[np.lexsort(official.T)], atol=1e-5, rtol=1e-5)
    else:
        np.testing.assert_allclose(np.unique(ours, axis=0), np.unique(official, axis=0), atol=1e-5, rtol=1e-5)
