"""TOPS, stage I: selection order and kept tokens."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.tops_stage1 import balanced_order
from mmfast.tokens import VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare the picks; among duplicated tokens compare the rows."""
    features, attention = torch.from_numpy(case["features"]), torch.from_numpy(case["cls_attention_mean"])
    kept, alpha, lam = int(case["k"]), float(case["alpha"]), float(case["lam"])
    total = features.shape[0]
    order = balanced_order(features, attention, kept, alpha, lam)
    method = get("tops_stage1").method(keep=kept, alpha=alpha, lam=lam)
    decision = method(VisualTokens.from_features(features, cls_attention=attention))
    indices = torch.arange(total) if decision is None else decision.indices
    assert indices.equal(order.sort().values)
    if torch.unique(features, dim=0).shape[0] < total:
        ours, theirs = features[indices].numpy(), features[torch.from_numpy(case["keep_idx"])].numpy()
        np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
        return
    np.testing.assert_array_equal(order.numpy(), case["selection_order"])
    np.testing.assert_array_equal(indices.numpy(), case["keep_idx"])
