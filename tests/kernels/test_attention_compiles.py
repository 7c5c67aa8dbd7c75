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
