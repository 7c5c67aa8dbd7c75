"""The kernels that choose, merge and cluster pass the compiler and fit a GPU, whether or not one is there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytestmark = pytest.mark.slow
Compile = Callable[..., list[str]]


@pytest.mark.parametrize("total", [300, 5000])
def test_dpc_knn(total: int, compile_only: Compile) -> None:
    from mmfast.kernels.dpc_knn import triton

    found = compile_only(triton, "_distances", "_density", "_apart", "_nearest")
    features, counts = torch.zeros(1, total, 64, dtype=torch.bfloat16), torch.tensor([total], dtype=torch.int32)
    triton.dpc_knn(features, 4, 3, counts)
    again = [] if total <= triton.MATRIX_LIMIT else ["_distances"]
    assert found == ["_distances", "_density", *again, "_apart", "_distances", "_nearest"]


def test_greedy_choices(compile_only: Compile) -> None:
    from mmfast.kernels.conditional_dpp import triton as dpp
    from mmfast.kernels.greedy_cover import triton as cover
    from mmfast.kernels.max_min_select import triton as far

    found = [
        *(compile_only(module, "_step") for module in (dpp, cover)),
        compile_only(far, "_step", "_walk"),
    ]
    features, counts = torch.zeros(1, 600, 64), torch.tensor([600], dtype=torch.int32)
    dpp.conditional_dpp(features, torch.ones(1, 600), 1, counts)
    cover.greedy_cover_cosine(features, 1, counts, torch.ones(1, 600), "multi")
    far.max_min_select(features, 2, counts, 4096)
    far.max_min_select(features, 2, counts, 0)
    assert found == [["_step"] * 2, ["_step"], ["_walk", "_step"]]


def test_bipartite_merge(compile_only: Compile) -> None:
    from mmfast.kernels.bipartite_merge import triton

    found = compile_only(triton, "_partners", "_average")
    features = torch.zeros(1, 300, 64, dtype=torch.bfloat16)
    triton.partners(features, torch.tensor([300], dtype=torch.int32))
    triton.average_groups(features, None, torch.zeros(1, 300, dtype=torch.int64), 4)
    assert found == ["_partners", "_average"]
