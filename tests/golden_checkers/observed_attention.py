"""Observed attention: scores, and what stays."""

from __future__ import annotations

import numpy as np

from mmfast.kv.entries import Retained
from mmfast.registry import get
from support.entries import Case, indices, kept_of, rows


def check(case: Case) -> None:
    """Compare every prompt of the batch."""
    method = get("observed_attention").method(keep=kept_of(case))
    for row, entries in rows(case):
        scores = method.scores(entries, method.keep).numpy()
        np.testing.assert_allclose(scores, case["scores"][row], rtol=1e-5, atol=1e-5)
        retained = method(entries) or Retained(entries.visual | True)
        np.testing.assert_array_equal(indices(retained.by_head(entries.heads)), np.sort(case["keep_idx"][row]))
