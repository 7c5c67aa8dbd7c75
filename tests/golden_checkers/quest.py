"""Quest: bounds of the pages, and the pages that are read."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.quest import best_pages, page_bounds, upper_bounds
from mmfast.registry import get
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare bound and choice per query head, and with one query head per stored head also the method's."""
    size, budget = int(case["page_size"]), int(case["token_budget"])
    for row, (keys, query) in enumerate(zip(tensor(case, "key"), tensor(case, "query_decode"), strict=True)):
        total, expected = keys.shape[1], case["keep_mask"][row, :, 0]
        bounds = upper_bounds(query[:, 0], *page_bounds(keys, size))
        np.testing.assert_allclose(bounds.numpy(), case["page_upper_bound"][row, :, 0], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(best_pages(bounds, max(3, budget // size), size, total).numpy(), expected)
        if len(query) == len(keys) and budget < total:
            method = get("quest").method(keep=budget, page_size=size, dense_layers=0)
            entries = Entries.of(keys, torch.zeros_like(keys))
            method.prepare(entries)
            chosen = method.choose(Step(keys, keys, query, seen=total, added=0, memory=entries.memory))
            np.testing.assert_array_equal(chosen.numpy(), expected)
