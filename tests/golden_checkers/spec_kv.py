"""SpecKV: what the last rows, look-ahead included, leave."""

from __future__ import annotations

import numpy as np

from mmfast.registry import get
from support.entries import Case, indices, rows


def check(case: Case) -> None:
    """The window of the vectors holds the look-ahead already."""
    method = get("spec_kv").method(
        keep=int(case["keep"]),
        window=int(case["window"]),
        kernel=int(case["kernel_size"]),
        pooling={"mean": "avg", "max": "max"}[str(case["pooling"])],
        reduce=str(case["reduction"]),
    )
    for row, entries in rows(case):
        kept = min(method.keep, len(entries))
        if kept == len(entries):
            np.testing.assert_array_equal(np.sort(case["keep_idx"][row]), np.tile(np.arange(kept), (entries.heads, 1)))
            continue
        retained = method.retain(entries, kept)
        np.testing.assert_array_equal(indices(retained.by_head(entries.heads)), np.sort(case["keep_idx"][row]))
        before = len(entries) - method.window
        scores = method.score(method.received(entries.last_rows(method.window), entries.heads), method.window)
        order = np.argsort(-scores[:, :before].numpy(), axis=-1, kind="stable")
        np.testing.assert_array_equal(order[:, : kept - method.window], case["selection_order"][row])
