"""AIM's merging: features after all rounds, in the official order."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.aim_merge import average_pairs
from mmfast.token_pruning.similarity import halvings
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare each frame, and the method where it would take the same rounds."""
    rounds = [int(merges) for merges in np.atleast_1d(case["r_list"])]
    for features, expected in zip(torch.from_numpy(case["features"]), case["out_features"], strict=True):
        merged, slots, source = average_pairs(features, rounds)
        np.testing.assert_allclose(merged.numpy(), expected, atol=1e-5, rtol=1e-5)
        total, kept = len(features), len(merged)
        assert source.unique().numel() == slots.unique().numel() == kept
        assert source[slots].tolist() == list(range(kept))
        if kept < total and list(halvings(total, kept)) == rounds:
            decision = get("aim_merge").method(keep=kept)(VisualTokens(features, Layout.grid(1, total)))
            assert decision is not None
            np.testing.assert_allclose(
                decision.features[slots.argsort().argsort()].numpy(), expected, atol=1e-5, rtol=1e-5
            )
