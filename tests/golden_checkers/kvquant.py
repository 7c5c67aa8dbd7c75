"""KVQuant: which numbers are outliers, and what is restored."""

from __future__ import annotations

import numpy as np

from mmfast.kv.packing.kvquant import outlier_mask, with_outliers
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare a matrix of tokens and channels."""
    states = tensor(case, "input")[None]
    axis = 1 if int(case["shared_dim"]) == 0 else 2
    threshold = float(case["threshold"]) if bool(case["include_sparse"]) else 1.0
    if "outlier_mask" in case:
        np.testing.assert_array_equal(outlier_mask(states, axis, threshold)[0].numpy(), case["outlier_mask"])
    block = with_outliers(states, axis, int(case["bits"]), threshold, whole_offset=bool(case["clamp"]))
    np.testing.assert_allclose(block.restore()[0].numpy(), case["output"], rtol=1e-5, atol=1e-5)
