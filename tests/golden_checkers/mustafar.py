"""Mustafar: which numbers survive."""

from __future__ import annotations

import numpy as np

from mmfast.registry import get
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare every prompt of the batch."""
    method = get("mustafar").method(sparsity=float(case["sparsity"]))
    for side in ("key", "value"):
        for row, states in enumerate(tensor(case, side)):
            block = method.pack(states, side, None)
            expected = case[f"{side}_pruned"][row]
            np.testing.assert_array_equal(block.restore().numpy(), expected)
            assert block.values.numel() == np.count_nonzero(expected)
    kept = np.stack([method.survivors(states).sum(dim=-1).numpy() for states in tensor(case, "key")])
    np.testing.assert_array_equal(kept, case["kept_per_vector"])
