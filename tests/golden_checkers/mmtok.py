"""MMTok: which tokens cover words and patches best."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.mmtok import best_cover, likeness
from mmfast.tokens import VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare picks, through the method too where nothing is excluded."""
    features, patches, words = (
        torch.from_numpy(case[name]) for name in ("features", "similarity_features", "text_token_embeds")
    )
    alpha, kept = float(case["alpha"]), int(case["k"])
    temperatures = float(case["tv_temp"]), float(case["vv_temp"])
    weights = torch.cat(
        [likeness(words, features, temperatures[0]), alpha * likeness(patches, patches, temperatures[1])]
    )
    excluded = torch.from_numpy(case["exclude_idx"]).long()
    picks = best_cover(weights, kept, excluded if excluded.numel() else None)
    np.testing.assert_array_equal(picks.sort().values.numpy(), case["keep_idx"])
    if excluded.numel() == 0 and kept < len(features):
        method = get("mmtok").method(
            keep=kept, alpha=alpha, text_temperature=temperatures[0], visual_temperature=temperatures[1]
        )
        decision = method(VisualTokens.from_features(features, patch_features=patches, text_embeds=words))
        assert decision is not None
        np.testing.assert_array_equal(decision.indices.numpy(), case["keep_idx"])
