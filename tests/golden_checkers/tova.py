"""TOVA: scores of the layer, and what stays; the last entry is forced, where the source gives it more than any."""

from __future__ import annotations

import numpy as np

from mmfast.kv.entries import Retained
from mmfast.registry import get
from support.entries import Case, indices, kept_of, rows


def check(case: Case) -> None:
    """Compare every prompt of the batch."""
    method = get("tova").method(keep=kept_of(case))
    for row, entries in rows(case):
        expected = case["scores"][row]
        scores = method.scores(entries, method.keep).expand(entries.heads, -1).numpy()
        np.testing.assert_allclose(scores[:, :-1], expected[:, :-1], rtol=1e-5, atol=1e-5)
        assert np.isposinf(scores[:, -1]).all()
        assert (expected[:, -1] >= case["scores"].max()).all()
        retained = method(entries) or Retained(entries.visual | True)
        np.testing.assert_array_equal(indices(retained.by_head(entries.heads)), np.sort(case["keep_idx"][row]))
