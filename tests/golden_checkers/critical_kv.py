"""CriticalKV over SnapKV: scores, and what stays.

SnapKV forces its window. The source gives it the highest score of the batch plus one, so that among these equal
entries chance decides which the first stage takes; the others are multiplied like any entry, and all of them stay.
"""

from __future__ import annotations

import numpy as np

from mmfast.kv.entries import Retained
from mmfast.registry import get
from support.entries import Case, indices, kept_of, rows


def check(case: Case) -> None:
    """Compare every prompt of the batch."""
    window = int(case["window"])
    method = get("critical_kv").method(
        keep=kept_of(case),
        scorer=f"snapkv(window={window}, kernel={int(case['kernel_size'])})",
        first_stage=float(case["first_stage_ratio"]),
        epsilon=float(case["epsilon"]),
    )
    prompts = [entries for _, entries in rows(case)]
    before = len(prompts[0]) - window
    highest = max(float(method.base.score(entries, method.keep)[:, :before].max()) for entries in prompts)
    largest = np.finfo(np.float32).max
    first = int(method.first_stage * method.keep)
    for row, entries in enumerate(prompts):
        expected = case["scores"][row]
        scores = method.scores(entries, method.keep).numpy()
        ours, theirs = scores[:, :before], expected[:, :before]
        np.testing.assert_array_equal(np.isposinf(ours), theirs == largest)
        free = np.isfinite(ours)
        np.testing.assert_allclose(ours[free], theirs[free], rtol=1e-5, atol=1e-5)
        assert np.isposinf(scores[:, before:]).all()
        np.testing.assert_array_equal((expected == largest).sum(axis=-1), np.full(entries.heads, first))
        weighted = (highest + 1 + method.epsilon) * method.contributions(entries).numpy()
        rest = expected[:, before:] != largest
        np.testing.assert_allclose(weighted[:, before:][rest], expected[:, before:][rest], rtol=1e-5, atol=1e-5)
        retained = method(entries) or Retained(entries.visual | True)
        np.testing.assert_array_equal(indices(retained.by_head(entries.heads)), np.sort(case["keep_idx"][row]))
