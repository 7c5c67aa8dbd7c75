"""AdaKV: scores, how many entries each head keeps, and which."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.eviction.adakv import AdaKV
from support.entries import Case, kept_of, rows


def check(case: Case) -> None:
    """Compare every prompt of the batch."""
    method = official(case) if "floor_alpha" in case else minimum(case)
    for row, entries in rows(case):
        heads, length = entries.heads, len(entries)
        retained = method(entries)
        mask = torch.ones(heads, length, dtype=torch.bool) if retained is None else retained.by_head(heads)
        np.testing.assert_array_equal(mask.numpy(), case["keep_mask"][row])
        if "head_lens" in case:
            np.testing.assert_array_equal(mask.sum(dim=-1).numpy(), case["head_lens"])
        if "scores" in case and length > int(case["window"]):
            window = int(case["window"])
            scores = method.scores(entries, max(method.keep_count(length), window + 1)).numpy()
            np.testing.assert_allclose(scores[:, : length - window], case["scores"][row], rtol=1e-5, atol=1e-5)
        if "out_key" in case:
            # That library leaves the keys alone and hides what goes in the attention.
            assert retained is None or retained.keys is None
            np.testing.assert_array_equal(entries.keys.numpy(), case["out_key"][row])


def official(case: Case) -> AdaKV:
    """The method as ported to KVCache-Factory."""
    pooling = str(case["pooling"]).removesuffix("pool")
    reduce = str(case.get("group_reduce", "mean"))
    return AdaKV(
        keep=int(case["keep"]),
        scorer=f"snapkv(window={int(case['window'])}, kernel={int(case['kernel_size'])}, pooling={pooling!r}, "
        f"reduce={('mean' if reduce == 'none' else reduce)!r})",
        alpha=float(case["floor_alpha"]),
        normalize=bool(case["normalize"]),
        compat="official",
    )


def minimum(case: Case) -> AdaKV:
    """The method as in kvpress."""
    return AdaKV(
        keep=kept_of(case),
        scorer=f"snapkv(window={int(case['window'])}, kernel={int(case['kernel_size'])})",
        alpha=float(case["alpha"]),
        floor="minimum",
    )
