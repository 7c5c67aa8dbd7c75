"""Key re-rotation after key norms."""

from __future__ import annotations

import numpy as np

from mmfast.kv.entries import Retained
from mmfast.registry import get
from support.entries import Case, kept_of, rows


def check(case: Case) -> None:
    """Compare every prompt of the batch."""
    assert str(case["base"]) == "knorm"
    base = get("knorm").method(keep=kept_of(case))
    for row, entries in rows(case):
        retained = base(entries) or Retained(entries.visual | True)
        kept = retained.by_head(entries.heads)
        keys = get("key_rerotation").method().adjust(entries, retained).keys
        for head in range(entries.heads):
            found = keys[head, kept[head]].numpy(), entries.values[head, kept[head]].numpy()
            np.testing.assert_allclose(found[0], case["out_key"][row, head], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(found[1], case["out_value"][row, head])
