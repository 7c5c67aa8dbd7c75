"""Uniform: kept indices."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.tokens import VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare the evenly spaced indices."""
    total = int(case["num_tokens"])
    decision = get("uniform").method(keep=int(case["k"]))(VisualTokens.from_features(torch.zeros(total, 2)))
    kept = torch.arange(total) if decision is None else decision.indices
    np.testing.assert_array_equal(kept.numpy(), case["keep_idx"])
