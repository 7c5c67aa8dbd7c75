"""MixKV: what the keys say, and what stays."""

from __future__ import annotations

import numpy as np

from mmfast.kv.eviction.mixkv import MixKV, key_similarity
from support.entries import Case, indices, rows

MIXES = {"headwisemixkv": "headwise", "mixkv": "equal", "vnorm": "value_norm"}


def check(case: Case) -> None:
    """Compare every prompt of the batch."""
    window = int(case["window"])
    method = MixKV(
        keep=int(case["keep"]),
        window=window,
        kernel=int(case["kernel_size"]),
        pooling=str(case["pooling"]).removesuffix("pool"),
        mix=MIXES[str(case["method"])],
    )
    for row, entries in rows(case):
        similarity, redundancy = key_similarity(entries.keys)
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        if "key_similarity_to_mean" in case:
            before = case["key_similarity_to_mean"][row]
            np.testing.assert_allclose(similarity[:, : before.shape[-1]].numpy(), before, **tolerance)
        if "head_redundancy" in case:
            expected = case["head_redundancy"].reshape(-1, entries.heads)[row]
            np.testing.assert_allclose(redundancy.numpy(), expected, **tolerance)
        retained = method(entries)
        chosen = np.broadcast_to(np.arange(len(entries)), (entries.heads, len(entries)))
        if retained is not None:
            chosen = indices(retained.by_head(entries.heads))
        np.testing.assert_array_equal(chosen, np.sort(case["keep_idx"][row]))
