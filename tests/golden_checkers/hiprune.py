"""HiPrune: which tokens are kept, with neighbours that wrap as in the official code."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Compare image by image; column 0 of the attention is the class token's."""
    middle, deep = (torch.from_numpy(case[f"received_attention_{name}_layer"])[:, 1:] for name in ("object", "deep"))
    total = middle.shape[1]
    side = round(total**0.5)
    method = get("hiprune").method(keep=int(case["k"]), alpha=float(case["alpha"]), compat="official")
    for row in range(len(middle)):
        signals = {"object": middle[row], "deep": deep[row]}
        decision = method(VisualTokens(torch.zeros(total, 1), Layout.grid(side, side), signals=signals))
        kept = torch.arange(total) if decision is None else decision.indices
        np.testing.assert_array_equal(kept.numpy(), np.flatnonzero(case["keep_mask"][row]))
