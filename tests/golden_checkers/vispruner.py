"""VisPruner: kept tokens."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.vispruner import important_and_diverse
from mmfast.tokens import VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare the tokens of each image; among duplicated tokens compare the rows."""
    kept, share = int(case["k"]), float(case["important_ratio"])
    for row, features in enumerate(torch.from_numpy(case["features"])):
        attention = torch.from_numpy(case["cls_attention"][row]).mean(dim=0)
        total = features.shape[0]
        chosen = important_and_diverse(features, attention, kept, int(kept * share)).sort().values
        decision = get("vispruner").method(keep=kept, important=share)(
            VisualTokens.from_features(torch.zeros(total, 3), cls_attention=attention, patch_features=features)
        )
        indices = torch.arange(total) if decision is None else decision.indices
        assert indices.equal(chosen)
        expected = case["keep_mask"][row].nonzero()[0]
        if torch.unique(features, dim=0).shape[0] < total:
            ours, theirs = features[chosen].numpy(), features[expected].numpy()
            np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
            continue
        np.testing.assert_array_equal(chosen.numpy(), expected)
        np.testing.assert_array_equal(chosen.numpy(), case["keep_idx"][row])
