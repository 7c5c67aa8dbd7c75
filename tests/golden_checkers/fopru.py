"""FoPru: the most significant patches, and the most significant rows (vectors made from the description)."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.registry import get
from mmfast.tokens import Layout, VisualTokens


def check(case: dict[str, np.ndarray]) -> None:
    """Run both strategies on every image."""
    significance = torch.from_numpy(case["significance"])
    height, width = int(case["grid_rows"]), int(case["grid_cols"])
    share = float(case["ratio"])
    # Counts of the description are cut off, with a guard against binary fractions.
    counts = {"rank": max(1, int(share * height * width + 1e-9)), "row": max(1, int(share * height + 1e-9)) * width}
    assert counts["rank"] == int(case["k_rank"])
    assert counts["row"] == int(case["num_rows"]) * width
    for row in range(len(significance)):
        tokens = VisualTokens(
            torch.zeros(height * width, 1), Layout.grid(height, width), signals={"significance": significance[row]}
        )
        for strategy, count in counts.items():
            decision = get("fopru").method(keep=count, strategy=strategy)(tokens)
            kept = torch.arange(height * width) if decision is None else decision.indices
            np.testing.assert_array_equal(kept.numpy(), case[f"keep_idx_{strategy}"][row])
            if strategy == "row":
                rows = np.unique(kept.numpy() // width)
                np.testing.assert_array_equal(rows, np.sort(case["keep_rows"][row]))
