"""VScan, first stage: which tokens are kept, and their merged features."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare image by image, with official counts."""
    features = torch.from_numpy(case["features"])
    side = round(features.shape[1] ** 0.5)
    method = get("vscan_stage1").method(keep=int(case["k"]), compat="official")
    for row in range(len(features)):
        signals = {
            name: torch.from_numpy(case[f"cls_attention_{name}"])[row].mean(dim=0) for name in ("shallow", "deep")
        }
        decision = method(VisualTokens(features[row], Layout.grid(side, side), signals=signals))
        kept = torch.arange(side * side) if decision is None else decision.indices
        np.testing.assert_array_equal(kept.numpy(), np.flatnonzero(case["keep_mask"][row]))
        merged = features[row] if decision is None else decision.features
        assert merged is not None
        np.testing.assert_allclose(merged.numpy(), case["out_features"][row], atol=1e-4, rtol=1e-5)
