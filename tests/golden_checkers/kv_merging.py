"""Value merging after key norms; the source lists survivors best first."""

from __future__ import annotations

import numpy as np

from mmfast.registry import get
from support.entries import Case, kept_of, rows


def check(case: Case) -> None:
    """Compare every prompt of the batch."""
    assert str(case["base"]) == "knorm"
    base = get("knorm").method(keep=kept_of(case))
    method = get("kv_merging").method(
        threshold=float(case["similarity_threshold"]), fraction=float(case["merge_fraction"]), compat="official"
    )
    for row, entries in rows(case):
        retained = base(entries)
        values = entries.values if retained is None else method.adjust(entries, retained).values
        order = base.scores(entries, base.keep).argsort(dim=-1, descending=True, stable=True)[:, : base.keep]
        found = values.gather(1, order[..., None].expand(-1, -1, values.shape[-1]))
        # With nothing dropped, the source returns everything in its own order.
        expected = case["out_value"][row]
        np.testing.assert_allclose((values if retained is None else found).numpy(), expected, rtol=1e-5, atol=1e-5)
