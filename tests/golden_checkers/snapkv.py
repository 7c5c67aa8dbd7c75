"""SnapKV: scores before the window, and what stays."""

from __future__ import annotations

import numpy as np

from mmfast.registry import get
from support.entries import Case, indices, kept_of, rows


def check(case: Case) -> None:
    """Compare every prompt of the batch; the official code ranks by score and appends the window."""
    options = {}
    if "pooling" in case:
        options["pooling"] = str(case["pooling"]).removesuffix("pool")
    if str(case.get("group_reduce", "none")) != "none":
        options["reduce"] = str(case["group_reduce"])
    method = get("snapkv").method(
        keep=kept_of(case), window=int(case["window"]), kernel=int(case["kernel_size"]), **options
    )
    for row, entries in rows(case):
        expected, length = case["scores"][row], len(entries)
        scores = method.scores(entries, method.keep).numpy()
        before = length - method.window
        # One of the two sources adds up the rows of the window, the other averages them.
        factor = 1 if "variant" in case else method.window
        np.testing.assert_allclose(scores[:, :before] * factor, expected[:, :before], rtol=1e-5, atol=1e-5)
        retained = method(entries)
        np.testing.assert_array_equal(indices(retained.by_head(entries.heads)), np.sort(case["keep_idx"][row]))
        if "selection_order" in case:
            order = np.argsort(-scores[:, :before], axis=-1, kind="stable")[:, : case["selection_order"].shape[-1]]
            np.testing.assert_array_equal(order, case["selection_order"][row])
