"""PyramidKV: the budgets of all layers, and what stays in the first and the last."""

from __future__ import annotations

import numpy as np

from mmfast.kv.eviction.pyramidkv import PyramidKV
from support.entries import Case, indices, rows


def check(case: Case) -> None:
    """Compare a table of budgets, or a prompt."""
    if "rows" in case:
        check_table(case)
    else:
        check_prompt(case)


def check_table(case: Case) -> None:
    """Compare the budgets of each row of a table, whose columns are named."""
    columns = str(case["row_columns"]).split(",")
    for values, expected in zip(case["rows"], case["kept_per_layer"], strict=True):
        row = dict(zip(columns, values.tolist(), strict=True))
        depth, length = int(row["num_layers"]), int(row["seq_len"])
        kvpress = "drop_ratio" in row
        method = PyramidKV(
            keep=1 - row["drop_ratio"] if kvpress else int(row["keep"]),
            scorer=f"snapkv(window={int(row['window'])})",
            beta=int(row["beta"]),
            budgets="kvpress" if kvpress else "official",
        )
        found = [method.layer_count(length, layer, depth) for layer in range(depth)]
        assert found == expected[:depth].tolist(), f"{row}: {found}"


def check_prompt(case: Case) -> None:
    """Compare the budgets, and the choice of two layers."""
    depth = int(case["num_layers"])
    reduce = str(case.get("group_reduce", "mean"))
    pooling = str(case["pooling"]).removesuffix("pool")
    method = PyramidKV(
        keep=int(case["keep"]),
        scorer=f"snapkv(window={int(case['window'])}, kernel={int(case['kernel_size'])}, pooling={pooling!r}, "
        f"reduce={('mean' if reduce == 'none' else reduce)!r})",
        beta=int(case["beta"]),
        budgets="official",
    )
    for layer, name in ((0, "keep_idx_first_layer"), (depth - 1, "keep_idx_last_layer")):
        for row, entries in rows(case, layer=layer, depth=depth):
            found = [method.layer_count(len(entries), number, depth) for number in range(depth)]
            assert found == case["kept_per_layer"].tolist(), f"{found}"
            retained = method(entries)
            places = np.arange(len(entries))
            chosen = np.broadcast_to(places, (entries.heads, len(places)))
            if retained is not None:
                chosen = indices(retained.by_head(entries.heads))
            np.testing.assert_array_equal(chosen, np.sort(case[name][row]))
