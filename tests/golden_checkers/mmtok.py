"""MMTok: which tokens cover words and patches best."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.mmtok import best_cover, coverage
from mmfast.tokens import VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare picks, through the method too where nothing is excluded."""
    features, patches, words = (
        torch.from_numpy(case[name]) for name in ("features", "similarity_features", "text_token_embeds")
    )
    alpha, kept = float(case["alpha"]), int(case["k"])
    temperatures = float(case["tv_temp"]), float(case["vv_temp"])
    excluded = torch.from_numpy(case["exclude_idx"]).long()
    picks = best_cover(coverage(features, patches, words, alpha, temperatures), kept, excluded)
    chosen = picks.sort().values
    if torch.unique(features, dim=0).shape[0] == len(features):
        np.testing.assert_array_equal(chosen.numpy(), case["keep_idx"])
    else:
        # Of equal tokens any may be picked.
        ours, theirs = features[chosen].numpy(), features.numpy()[case["keep_idx"]]
        np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    if excluded.numel() == 0 and kept < len(features):
        method = get("mmtok").method(
            keep=kept, alpha=alpha, text_temperature=temperatures[0], visual_temperature=temperatures[1]
        )
        decision = method(VisualTokens.from_features(features, patch_features=patches, text_embeds=words))
        assert decision is not None
        assert decision.indices.equal(chosen)
