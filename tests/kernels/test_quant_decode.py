"""quant_decode: attention to codes is attention to the numbers they stand for, bit layout and all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.kernels import use
from mmfast.kernels.quant_decode import quant_decode
from mmfast.kernels.words import Codes, joined
from mmfast.kv.base import Packed
from mmfast.kv.packing.calibquant import CalibQuant
from mmfast.kv.packing.int8 import Int8
from mmfast.kv.packing.kivi import Kivi
from mmfast.kv.quantised import Raw
from support.dense import assert_near, dense_attention

PACKERS = [
    Kivi(bits=2, group=32, residual=32),
    Kivi(bits=4, group=16, residual=32),
    Kivi(bits=8, group=8, residual=32),
    Int8(),
]
SHAPES = [
    # batch, heads, groups, rows, width, keys packed, values packed, in all
    (2, 4, 2, 1, 32, 64, 50, 71),
    (1, 6, 2, 3, 96, 96, 130, 150),
    (2, 2, 2, 8, 64, 32, 32, 32),
    (1, 4, 1, 1, 32, 0, 5, 33),
]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
by_packer = pytest.mark.parametrize("packer", PACKERS, ids=lambda packer: packer.to_text())


def batch_of(rows: list[Packed]) -> Codes | None:
    """Lay what the rows of a batch have packed side by side."""
    codes = [row.readable() for row in rows]
    if codes[0] is None:
        return None
    parts = {name: [getattr(one, name) for one in codes] for name in ("words", "scale", "low")}
    low = None if codes[0].low is None else torch.cat(parts["low"])
    return replace(codes[0], words=torch.cat(parts["words"]), scale=torch.cat(parts["scale"]), low=low)


def case(
    packer: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """Return arguments, and the numbers for which keys and values stand."""
    batch, heads, groups, rows, width, keys, values, entries = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *sizes: torch.randn(*sizes, generator=generator).to(device, dtype)  # noqa: E731
    arguments: dict[str, Any] = {"query": draw(batch, heads, rows, width)}
    numbers = []
    for side, packed in (("key", keys), ("value", values)):
        states = draw(batch, groups, entries, width)
        blocks = [packer.pack(row[:, :packed], side, None) for row in states] if packed else []
        arguments[side] = batch_of(blocks) if packed else None
        arguments[f"loose_{side}"] = states[:, :, packed:]
        restored = torch.stack([block.restore() for block in blocks]) if packed else states[:, :, :0]
        numbers.append(torch.cat([restored, states[:, :, packed:]], dim=2))
    return arguments, (numbers[0], numbers[1])


def masks(shape: tuple[int, ...], device: torch.device) -> list[dict[str, Any]]:
    batch, heads, groups, rows, _, _, _, entries = shape
    generator = torch.Generator().manual_seed(5)
    of_rows = torch.rand(batch, 1, rows, entries, generator=generator) > 0.3
    of_rows[0, :, 0] = False
    of_groups = torch.rand(batch, groups, entries, generator=generator) > 0.3
    bias = torch.randn(batch, heads, entries, generator=generator).to(device)
    return [
        {},
        {"visible": of_rows.to(device), "scaling": 0.4, "softcap": 3.0},
        {"visible": of_groups.to(device), "bias": bias},
    ]


def dense(arguments: dict[str, Any], numbers: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    visible, bias = arguments.get("visible"), arguments.get("bias")
    if visible is not None and visible.ndim == 3:
        visible = visible.repeat_interleave(arguments["query"].shape[1] // visible.shape[1], dim=1)[:, :, None]
    rest = {name: arguments.get(name) for name in ("scaling", "softcap")}
    bias = None if bias is None else bias[:, :, None]
    return dense_attention(arguments["query"], *numbers, visible, bias=bias, **rest)


@by_packer
@by_shape
def test_codes_are_the_numbers_they_stand_for(packer: Any, shape: tuple[int, ...]) -> None:
    arguments, numbers = case(packer, shape, torch.float32, torch.device("cpu"))
    for mask in masks(shape, torch.device("cpu")):
        with use("torch"):
            assert_near(quant_decode(**arguments, **mask), dense(arguments | mask, numbers), torch.float32)


@by_packer
def test_blocks_do_not_change_the_result(packer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfast.kernels.quant_decode import reference

    arguments, numbers = case(packer, SHAPES[1], torch.float32, torch.device("cpu"))
    mask = masks(SHAPES[1], torch.device("cpu"))[2]
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1)
    with use("torch"):
        assert_near(quant_decode(**arguments, **mask), dense(arguments | mask, numbers), torch.float32)


def test_factors_of_a_whole_axis() -> None:
    """As CalibQuant stores them: one factor for all tokens of a block, or for the block."""
    for per_channel in (True, False):
        arguments, numbers = case(Int8(), SHAPES[0], torch.float32, torch.device("cpu"))
        packed = CalibQuant(bits=4, per_channel=per_channel)
        states = numbers[0][:, :, :64]
        blocks = [packed.quantise(row, "key") for row in states]
        arguments["key"] = batch_of(blocks)
        whole = torch.cat([torch.stack([block.restore() for block in blocks]), numbers[0][:, :, 64:]], dim=2)
        with use("torch"):
            assert_near(quant_decode(**arguments), dense(arguments, (whole, numbers[1])), torch.float32)


@settings(max_examples=40, deadline=None)
@drawn(
    bits=st.sampled_from([2, 4, 8]),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    side=st.sampled_from(["key", "value"]),
    seed=st.integers(0, 99),
)
def test_blocks_that_follow_each_other_are_one(bits: int, lengths: list[int], side: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packer = Kivi(bits=bits, group=16, residual=16)
    blocks = [packer.pack(torch.randn(2, 16 * length, 32, generator=generator), side, None) for length in lengths]
    whole = joined([block.readable() for block in blocks])
    restored = torch.cat([block.restore() for block in blocks], dim=1)
    assert torch.equal(whole.restore()[0], restored)
    assert whole.tokens == restored.shape[1]
    for start in range(0, whole.tokens, 2 * whole.unit):
        stop = min(start + 2 * whole.unit, whole.tokens)
        assert torch.equal(whole.part(start, stop).restore()[0], restored[:, start:stop])


def test_blocks_that_do_not_fit_together() -> None:
    states = torch.randn(2, 24, 32)
    by_two, by_four = Kivi(bits=2, group=8, residual=8), Kivi(bits=4, group=8, residual=8)
    two, four = (packer.pack(states, "key", None).readable() for packer in (by_two, by_four))
    assert joined([two, four]) is None
    # 24 codes of 2 bits end within a word, as many of 4 bits do not.
    assert joined([two, two]) is None
    assert joined([four, four]).tokens == 48
    assert Raw.of(states).readable() is None
    assert by_four.pack(states[:, :20], "key", None).readable() is None
    assert Int8().pack(states[..., :6], "key", None).readable() is None
    assert CalibQuant(bits=1).quantise(states, "key").readable() is None


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@by_packer
def test_triton_agrees(packer: Any, dtype: torch.dtype, device: torch.device) -> None:
    for shape in SHAPES:
        arguments, _ = case(packer, shape, dtype, device)
        # One mask a dtype: the interpreter is slow.
        mask = masks(shape, device)[[torch.float32, torch.float16, torch.bfloat16].index(dtype)]
        with use("torch"):
            wanted = quant_decode(**arguments, **mask)
        with use("triton"):
            found = quant_decode(**arguments, **mask)
        assert found[0].dtype == dtype
        assert_near(found, wanted, dtype)


@pytest.mark.interpreter
def test_triton_with_factors_of_a_whole_axis_and_any_strides(device: torch.device) -> None:
    for per_channel in (True, False):
        arguments, _ = case(Int8(), SHAPES[0], torch.float32, device)
        states = torch.randn(2, 2, 64, 32, device=device)
        blocks = [CalibQuant(bits=2, per_channel=per_channel).quantise(row, "key") for row in states]
        codes = batch_of(blocks)
        wide = codes.words.transpose(2, 3).contiguous().transpose(2, 3)
        arguments["key"] = replace(codes, words=wide, low=codes.low.clone())
        arguments["loose_key"] = arguments["loose_key"].transpose(2, 3).contiguous().transpose(2, 3)
        with use("torch"):
            wanted = quant_decode(**arguments)
        with use("triton"):
            assert_near(quant_decode(**arguments), wanted, torch.float32)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loose_key", torch.zeros(2, 3, 7, 32), "loose_key has 3 heads"),
        ("loose_value", torch.zeros(2, 2, 20, 32), "value has 70 entries, must have as many as key: 71"),
        ("loose_value", torch.zeros(2, 2, 21, 16), "value has 32 channels"),
        ("visible", torch.ones(2, 2, 71), "visible is torch.float32"),
        ("visible", torch.ones(2, 2, 70, dtype=torch.bool), "visible has shape"),
        ("bias", torch.ones(2, 3, 71), "bias has 3 heads"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Any, message: str) -> None:
    arguments, _ = case(PACKERS[1], SHAPES[0], torch.float32, torch.device("cpu"))
    with pytest.raises((TypeError, ValueError), match=message):
        quant_decode(**arguments | {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": 8}, "key has levels=8"),
        ({"signed": True}, "key is signed with levels=16"),
        ({"words": torch.zeros(2, 2, 8, 32, dtype=torch.int64)}, "words of key are torch.int64"),
        ({"words": torch.zeros(1, 2, 8, 32, dtype=torch.int32)}, "words of key has shape"),
        ({"scale": torch.ones(2, 2, 3, 32)}, "scale of key has shape"),
        ({"low": torch.ones(2, 2, 1, 32)}, "low of key has shape"),
    ],
)
def test_codes_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments, _ = case(PACKERS[1], SHAPES[0], torch.float32, torch.device("cpu"))
    arguments["key"] = replace(arguments["key"], **changes)
    with pytest.raises((TypeError, ValueError), match=message):
        quant_decode(**arguments)
