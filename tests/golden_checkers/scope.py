"""SCOPE: selection order, kept tokens and features."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.scope import coverage_order
from mmfast.tokens import VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare the picks of each image; among duplicated tokens compare the rows."""
    kept, alpha, combine = int(case["k"]), float(case["alpha"]), str(case["combine"])
    for row, features in enumerate(torch.from_numpy(case["features"])):
        attention = torch.from_numpy(case["cls_attention_sum"][row])
        total = features.shape[0]
        order = coverage_order(features, attention**alpha, kept, combine)
        decision = get("scope").method(keep=kept, alpha=alpha, combine=combine)(
            VisualTokens.from_features(torch.zeros(total, 3), cls_attention=attention, patch_features=features)
        )
        indices = torch.arange(total) if decision is None else decision.indices
        assert indices.equal(order.sort().values)
        ours, theirs = features[indices].numpy(), case["out_features"][row]
        if torch.unique(features, dim=0).shape[0] < total:
            ours, theirs = ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)]
        else:
            np.testing.assert_array_equal(order.numpy(), case["selection_order"][row])
            np.testing.assert_array_equal(indices.numpy(), case["keep_idx"][row])
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
