"""Every operation with the inputs of the benchmarks: Triton against torch, tiny anywhere and at real sizes on a GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mmfast.bench.costs import Size
from mmfast.bench.kernels import SIZES
from mmfast.bench.operations import OPERATIONS, Draw
from support.benched import CLOSE, near, runs

TINY = replace(SIZES["tiny"][0], batch=1, tokens=32, kept=4, item=4)
CHOOSES = ("max_min_select", "conditional_dpp", "greedy_cover_cosine", "dpc_knn", "bipartite_merge")
"""Between thousands of tokens there are near ties, which may fall either way by rounding: the files of these
operations compare choices exactly, among as many tokens as one image has."""

# Every shape as models are run today, and one in every dtype.
REAL = [(size, torch.bfloat16) for size in SIZES["real"]]
REAL += [(SIZES["real"][2], dtype) for dtype in CLOSE if dtype != torch.bfloat16]


@pytest.mark.interpreter
@pytest.mark.parametrize("name", OPERATIONS)
def test_triton_gives_the_same(name: str, device: torch.device) -> None:
    sides = runs(name, TINY, str(device), torch.float32)
    with torch.inference_mode():
        near(sides["triton"](), sides["torch"](), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "dtype"), REAL, ids=[f"{size.label}-{dtype}" for size, dtype in REAL])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in CHOOSES])
def test_triton_gives_the_same_at_real_sizes(name: str, size: Size, dtype: torch.dtype) -> None:
    sides = runs(name, replace(size, item=dtype.itemsize), "cuda", dtype)
    with torch.inference_mode():
        near(sides["triton"](), sides["torch"](), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES["real"][:3], ids=lambda size: size.label)
def test_each_pick_is_the_farthest_at_real_sizes(size: Size) -> None:
    features = Draw(size, torch.device("cuda"), torch.float32).features()
    picks = runs("max_min_select", replace(size, item=4), "cuda", torch.float32)["triton"]()[0]
    assert picks.unique().numel() == size.kept
    unit = torch.nn.functional.normalize(features[0].double(), dim=-1)
    largest = torch.full((size.tokens,), -torch.inf, device="cuda", dtype=torch.float64)
    for before, pick in pairwise(picks.tolist()):
        largest = torch.maximum(largest, unit @ unit[before])
        largest[before] = torch.inf
        assert float(largest[pick] - largest.min()) <= 1e-5
