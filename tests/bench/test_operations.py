"""What the benchmark runs: every form of an operation gives the same, and cells say what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmfast.bench.ceilings import Ceilings
from mmfast.bench.kernels import SIZES, kernel_cell, kernel_sizes
from mmfast.bench.operations import OPERATIONS
from support.benched import near, runs, tensors

TINY = replace(SIZES["tiny"][0], batch=2, item=4)
SAME = {
    # Side that gives what the operation does, where it is not the baseline; None where it gives something else.
    "few_rows": "attention read",
    "row_lse": None,
    "rerotate": "turn back and on",
    "column_sums": "attention read",
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_compared_gives_the_same(name: str) -> None:
    sides = runs(name, TINY, "cpu", torch.float32)
    other = SAME.get(name, OPERATIONS[name].baseline)
    with torch.inference_mode():
        found = sides["torch"]()
        if other is None:
            assert tensors(found)[0].isfinite().all()
            return
        wanted = sides[other]()
    if name == "bipartite_merge":
        # Which row stands where is told by what comes after the features.
        found, wanted = found.features, wanted
    near(found, wanted, torch.float32)


def test_a_cell_says_what_was_measured() -> None:
    ceilings = Ceilings(copy=1e9, matmul=1e9)
    device, dtype = torch.device("cpu"), torch.float32
    cell = kernel_cell("max_min_select", TINY, device=device, dtype=dtype, ceilings=ceilings, repeats=3, seconds=9.0)
    assert "tensors on cpu" in cell["left_out"]["triton"]
    row = cell["sides"]["torch"]
    assert row["seconds"]["repeats"] == 3
    assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
    assert row["bytes_per_second"] == pytest.approx(cell["bytes"] / row["device_seconds"]["median"])
    assert row["share_of_copy"] == pytest.approx(row["bytes_per_second"] / 1e9)
    assert row["slower"] == (row["faster"]["median"] < 1.0)
    assert cell["sides"]["loop"]["faster"]["median"] == 1.0


def test_features_are_not_measured_twice_for_heads() -> None:
    on_features = kernel_sizes("real", "max_min_select", torch.bfloat16)
    on_heads = kernel_sizes("real", "column_sums", torch.bfloat16)
    assert {(size.tokens, size.batch) for size in on_features} == {
        (n, b) for n in (576, 2880, 12544) for b in (1, 8, 32)
    }
    assert {size.head_dim for size in on_heads} == {64, 128}
    assert {size.item for size in on_heads} == {2}
