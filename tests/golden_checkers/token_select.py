"""TokenSelect: what is read, for one query and for the mean of several."""

from __future__ import annotations

import numpy as np

from mmfast.kv.entries import Step
from mmfast.registry import get
from support.entries import Case, tensor


def check(case: Case) -> None:
    """Compare the choice; the vectors hold one prompt."""
    first, local, top = (int(case[name]) for name in ("n_init", "n_local", "topk"))
    kernel = int(case["pool_kernel"])
    method = get("token_select").method(
        keep=first + top + local,
        first=first,
        local=local,
        kernel=kernel if kernel > 0 else None,
        dense_layers=0,
    )
    keys = tensor(case, "key")[0]
    query = tensor(case, "query").mean(dim=0)[:, None]
    chosen = method.choose(Step(keys, keys, query, seen=keys.shape[1], added=0))
    found = np.arange(keys.shape[1]) if chosen is None else chosen.nonzero().squeeze(-1).numpy()
    np.testing.assert_array_equal(found, case["keep_idx"])
