"""The kernels of attention pass the compiler and fit a GPU, whether or not one is there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mmfast.kv.packing.int8 import Int8
from mmfast.kv.packing.kivi import Kivi

Compile = Callable[..., list[str]]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 128), (torch.float32, 256)], ids=str)
def test_split_attention(
    dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch, compile_only: Compile
) -> None:
    from mmfast.kernels import split_attention
    from mmfast.kernels.split_attention import Source, attend

    found = compile_only(split_attention, "_partial", "_merge")
    monkeypatch.setattr(split_attention, "processors", lambda device: 64)
    query, key = torch.zeros(2, 8, 20, width, dtype=dtype), torch.zeros(2, 2, 900, width, dtype=dtype)
    indices, counts = torch.zeros(2, 2, 500, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
    limits, bias = torch.zeros(2, 20, dtype=torch.int64), torch.zeros(2, 2, 900)
    named = Source(key, key, bias=bias, indices=indices, counts=counts, limits=limits)
    attend(query, [named], scaling=None, softcap=2.0)
    kept, sees = torch.ones(2, 1, 20, 880, dtype=torch.bool), torch.ones(2, 20, 20, dtype=torch.bool)
    attend(query, [Source(key, key, kept, sees=sees)], scaling=None, softcap=None)
    assert found == ["_partial", "_merge", "_partial", "_merge"]


@pytest.mark.parametrize(
    ("dtype", "method"),
    [(torch.bfloat16, Kivi(bits=4)), (torch.bfloat16, Int8()), (torch.float32, Kivi(bits=2))],
    ids=lambda one: one.to_text() if isinstance(one, Kivi | Int8) else str(one),
)
def test_quant_decode(
    dtype: torch.dtype,
    method: Kivi | Int8,
    monkeypatch: pytest.MonkeyPatch,
    compile_only: Compile,
) -> None:
    from mmfast.kernels.quant_decode import triton

    found = compile_only(triton, "_codes")
    states = torch.zeros(2, 60, 128, dtype=dtype)
    key, value = (method.pack(states[:, :count], side, None).readable() for side, count in (("key", 32), ("value", 50)))
    query, seen = torch.zeros(1, 8, 1, 128, dtype=dtype), torch.ones(1, 1, 1, 60, dtype=torch.bool)
    loose = states[None, :, 32:], states[None, :, 50:]
    monkeypatch.setattr(triton, "splits_of", lambda *_: (1, 64))
    triton.attend_codes(query, key, value, *loose, seen, None, scaling=None, softcap=None)
    assert found == ["_codes"]


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 128), (torch.float32, 256)], ids=str)
def test_masked_rect(dtype: torch.dtype, width: int, compile_only: Compile) -> None:
    from mmfast.kernels.masked_rect import triton

    found = compile_only(triton, "_forward", "_backward_query", "_backward_states")
    query = torch.zeros(1, 4, 40, width, dtype=dtype, requires_grad=True)
    key = torch.zeros(1, 2, 40, width, dtype=dtype, requires_grad=True)
    places, valid = torch.arange(40)[None], torch.ones(1, 40, dtype=torch.bool)
    rectangles = torch.tensor([[[0, 40, 0, 40, 1]]])
    output, _ = triton.attend_rectangles(query, key, key, rectangles, places, valid, 0.1, 2.0)
    output.sum().backward()
    assert found == ["_forward", "_backward_query", "_backward_states"]


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 128), (torch.float32, 256)], ids=str)
def test_attention_stats(dtype: torch.dtype, width: int, compile_only: Compile) -> None:
    from mmfast.kernels.attention_stats import triton, triton_backward
    from mmfast.kernels.attention_stats.problem import Options, problem_of
    from mmfast.kernels.attention_stats.triton_backward import Pull

    found, back = compile_only(triton), compile_only(triton_backward)
    query, key = torch.zeros(1, 4, 200, width, dtype=dtype), torch.zeros(1, 2, 200, width, dtype=dtype)
    level, weights, visual = torch.zeros(1, 4, 200), torch.ones(1, 200), torch.ones(1, 200, dtype=torch.bool)
    mask, edges = torch.zeros(1, 1, 200, 200), torch.tensor([0, 50, 200])
    # Most of what is optional at once; the rest is left out of it.
    for given in (Options(), Options(packed=edges, mask=mask, window=9, softcap=3.0, valid=visual)):
        asked = problem_of(query, key, given)
        triton.rows(asked, key, visual, weights)
        triton.probabilities(asked, level, 0)
        triton.winners(asked, level, 0)
        triton.column_sums(asked, level, weights, "max", "max", 0, named=True)
    rows = Pull("rows", entries=level, visual=visual, value=key, towards=query)
    triton_backward.totals(asked, Pull("few", entries=torch.zeros(1, 4, 200, 200)), level, every=True)
    won = torch.zeros(1, 1, 200, dtype=torch.int32), torch.zeros(1, 200, 200, dtype=torch.int16)
    sums = Pull("sums", 0, torch.zeros(1, 1, 200), weights, *won)
    for pull in (rows, sums):
        triton_backward.query_gradient(asked, pull, level, level)
        triton_backward.key_gradient(asked, pull, level, level)
        triton_backward.mask_gradient(asked, pull, level, level)
    assert found == 2 * ["_rows_kernel", "_probabilities_kernel", "_winners_kernel", "_columns_kernel"]
    assert back == ["_query_kernel", *2 * ["_query_kernel", "_key_kernel", "_mask_kernel"]]
