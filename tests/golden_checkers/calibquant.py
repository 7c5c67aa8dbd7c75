"""CalibQuant: codes, scale and zero point of a block, and what they restore."""

from __future__ import annotations

import numpy as np

from mmfast.registry import get
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare a batch of tokens and channels; its rows are treated as heads are."""
    method = get("calibquant").method(
        bits=int(case["bits"]),
        key_range=float(case["range_scale"]),
        per_channel=bool(case["per_channel"]),
        compat="official",
    )
    block = method.quantise(tensor(case, "input"), "key")
    np.testing.assert_array_equal(block.codes().numpy(), case["codes"])
    for name, found in (("scale", block.scale), ("zero_point", -block.low / block.scale)):
        expected = case[name]
        np.testing.assert_allclose(found.numpy().reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(block.restore().numpy(), case["dequant"], rtol=1e-5, atol=1e-5)
