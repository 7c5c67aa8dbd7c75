"""GEAR: the quantised block with its outliers, and the low-rank matrix beside it."""

from __future__ import annotations

import numpy as np

from mmfast.kv.quantised import join_heads
from mmfast.registry import get
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare every prompt of the batch; the iteration starts with the matrix of the case."""
    group = int(case["group_size"])
    method = get("gear").method(
        bits=int(case["bits"]),
        group=group,
        residual=group,
        sparsity=float(case["sparsity"]),
        rank=int(case["rank"]),
        loop=int(case["loop"]),
        compat="official",
    )
    for side in ("key", "value"):
        states = tensor(case, side)
        for row in range(len(states)):
            assert method.outliers_per_side(join_heads(states[row]), side) == int(case["outliers_per_side"])
            quantised = method.quantise(states[row], side)
            expected = case[f"{side}_quant"][row]
            np.testing.assert_allclose(quantised.restore().numpy(), expected, rtol=1e-5, atol=1e-5)
            block = method.corrected(states[row], quantised, tensor(case, "init_p")[row])
            expected = case[f"{side}_lowrank"][row]
            np.testing.assert_allclose(block.correction().numpy(), expected, rtol=1e-4, atol=1e-4)
