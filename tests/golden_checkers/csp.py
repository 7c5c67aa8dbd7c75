"""CSP: both lists of scores, what each chooses, and what is stored."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.eviction.csp import CSP
from support.entries import Case, indices, rows, tensor


def check(case: Case) -> None:
    """Compare the lists of the official code, and how it is run here."""
    length = tensor(case, "key").shape[-2]
    visual = torch.zeros(length, dtype=torch.bool)
    for start in case["image_starts"]:
        visual[int(start) : int(start) + int(case["image_len"])] = True
    heavy, recent = (int(length * float(case[f"{name}_ratio"])) for name in ("heavy", "recent"))
    kept = heavy + recent
    options = {
        "keep": kept,
        "recent": recent / kept,
        "cross": float(case["cross_ratio"]),
        "stretch": float(case["kv_recent_bias"]),
    }
    method = CSP(**options, compat="official")
    for row, entries in rows(case, visual):
        if "self_scores" not in case:
            assert method(entries) is None
            continue
        last = method.last_count(recent, kept)
        assert last == int(case["recent_kept"])
        own, other = method.scores(entries, recent, last)
        np.testing.assert_allclose(own.numpy(), case["self_scores"][row], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(other.numpy(), case["cross_scores"][row], rtol=1e-5, atol=1e-5)
        by_own, by_other = method.lists(own, other, kept - last)
        np.testing.assert_array_equal(indices(by_own), case["self_idx"][row])
        np.testing.assert_array_equal(indices(by_other), case["cross_idx"][row])
        twice = (by_own & by_other).sum(dim=-1)
        np.testing.assert_array_equal(twice.numpy(), case["duplicates_per_head"])
        assert sum(method.list_counts(kept - last)) + last == int(case["official_len"])

        retained = method(entries)
        if retained is None:
            continue
        copies = torch.where(retained.kept, retained.bias.exp(), 0)
        expected = torch.cat([by_own.long() + by_other.long(), torch.ones(entries.heads, last)], dim=-1)
        np.testing.assert_allclose(copies.numpy(), expected.numpy(), rtol=1e-6)
        assert retained.counts == [int(case["official_len"])] * entries.heads
        union = CSP(**options)(entries)
        assert union.counts == [kept] * entries.heads
        assert not ((by_own | by_other) & ~union.kept[:, : length - last]).any()
