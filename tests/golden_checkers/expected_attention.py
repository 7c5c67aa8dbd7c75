"""Expected attention: scores, and what stays; sinks are forced, where the source gives them the highest score."""

from __future__ import annotations

import numpy as np

from mmfast.kv.entries import Retained
from mmfast.registry import get
from support.entries import Case, indices, kept_of, rows


def check(case: Case) -> None:
    """Compare every prompt of the batch."""
    sinks = int(case["n_sink"])
    method = get("expected_attention").method(
        keep=kept_of(case),
        future=int(case["n_future_positions"]),
        sinks=sinks,
        covariance=bool(case["use_covariance"]),
        value_norm=bool(case["use_vnorm"]),
        epsilon=float(case["epsilon"]),
    )
    for row, entries in rows(case):
        expected = case["scores"][row]
        scores = method.scores(entries, method.keep).numpy()
        np.testing.assert_allclose(scores[:, sinks:], expected[:, sinks:], rtol=1e-5, atol=1e-5)
        assert np.isposinf(scores[:, :sinks]).all()
        assert (expected[:, :sinks] >= case["scores"].max()).all()
        retained = method(entries) or Retained(entries.visual | True)
        np.testing.assert_array_equal(indices(retained.by_head(entries.heads)), np.sort(case["keep_idx"][row]))
