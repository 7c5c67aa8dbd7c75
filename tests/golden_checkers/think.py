"""ThinK: keys without the channels that matter least."""

from __future__ import annotations

import numpy as np

from mmfast.registry import get
from support.entries import Case, rows


def check(case: Case) -> None:
    """Compare every prompt of the batch."""
    method = get("think").method(drop=float(case["channel_drop_ratio"]), window=int(case["window"]))
    for row, entries in rows(case):
        block = method.pack(entries.keys, "key", entries)
        np.testing.assert_allclose(block.restore().numpy(), case["out_key"][row], rtol=1e-5, atol=1e-5)
