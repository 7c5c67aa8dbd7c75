"""SparseMM: the budgets of all heads, and what stays in one layer."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file

from mmfast.kv.eviction.sparsemm import SparseMM
from support.entries import Case, rows


def check(case: Case) -> None:
    """Compare every prompt of the batch; the scores of the heads come in a file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "scores.safetensors"
        save_file({"scores": torch.from_numpy(case["head_scores"])}, path)
        check_file(case, str(path))


def check_file(case: Case, path: str) -> None:
    """Compare with the scores of a file."""
    keep, window = int(case["keep"]), int(case["window"])
    reduce = str(case.get("group_reduce", "mean"))
    method = SparseMM(
        keep=keep,
        window=window,
        kernel=int(case["kernel_size"]),
        pooling=str(case["pooling"]).removesuffix("pool"),
        reduce="mean" if reduce == "none" else reduce,
        head_scores=path,
        min_share=float(case["min_ratio"]),
        compat="official",
    )
    heads = case["key"].shape[1]
    budgets = method.head_budgets(keep - window, case["head_scores"].shape, heads)
    np.testing.assert_array_equal(budgets.numpy(), case["head_budgets"])
    depth = case["head_scores"].shape[0]
    for row, entries in rows(case, layer=int(case["layer"]), depth=depth):
        length = len(entries)
        retained = method(entries)
        mask = torch.ones(heads, length, dtype=torch.bool) if retained is None else retained.by_head(heads)
        if keep == length:
            # The method leaves such a prompt alone; the official code does so where there is less than the budget.
            assert retained is None
            mask = method.official_mask(entries, keep)
        expected = case["keep_mask"]
        np.testing.assert_array_equal(mask.numpy(), expected if expected.ndim == 2 else expected[row])
        np.testing.assert_array_equal(mask.sum(dim=-1).numpy(), case["head_lens"].reshape(-1, heads)[row])
