"""KIVI: what is packed when, how far off it may be, and visual entries apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast.kernels.words import pack_codes, unpack_codes
from mmfast.kv.entries import Entries
from mmfast.kv.packing.kivi import Kivi


def prompt(states: torch.Tensor, visual: list[int]) -> Entries:
    mask = torch.zeros(states.shape[1], dtype=torch.bool)
    mask[visual] = True
    return Entries.of(states, states, visual=mask)


def stored_bytes(block) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in block.tensors())


@given(
    levels=st.sampled_from([2, 3, 4, 8, 16, 32, 256]),
    length=st.integers(0, 70),
    axis=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_codes_come_out_of_words_as_they_went_in(levels: int, length: int, axis: int, seed: int) -> None:
    shape = (2, length, 3) if axis == 1 else (2, 3, length)
    codes = torch.randint(levels, shape, generator=torch.Generator().manual_seed(seed)).int()
    codes[..., -1:] = levels - 1
    words = pack_codes(codes, levels, axis)
    assert words.dtype == torch.int32
    assert torch.equal(unpack_codes(words, levels, axis, length), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("side", ["key", "value"])
def test_no_number_is_off_by_more_than_half_a_code(bits: int, side: str) -> None:
    torch.manual_seed(bits)
    states = torch.randn(2, 64, 32) * torch.logspace(-2, 2, 32)
    block = Kivi(bits=bits, group=16, residual=32).pack(states, side, None)
    axis = 1 if side == "key" else 2
    limit = block.scale.repeat_interleave(16, dim=axis) / 2
    assert ((block.restore() - states).abs() <= limit * 1.001 + 1e-6).all()


@pytest.mark.parametrize("side", ["key", "value"])
def test_what_is_stored_is_counted_to_the_byte(side: str) -> None:
    states = torch.randn(2, 64, 32, dtype=torch.bfloat16)
    block = Kivi(bits=4, group=32, residual=32).pack(states, side, None)
    codes, scales = states.numel() // 2, states.numel() // 32
    assert stored_bytes(block) == codes + 2 * scales * 2


def test_keys_wait_for_a_whole_residual_and_values_do_not() -> None:
    method = Kivi(group=32, residual=64)
    assert [method.due(loose, "key") for loose in (0, 63, 64, 200)] == [0, 0, 64, 192]
    assert [method.due(loose, "value") for loose in (0, 63, 64, 65, 200)] == [0, 0, 0, 1, 136]
    eager = Kivi(group=32, residual=0)
    assert (eager.due(70, "key"), eager.due(70, "value")) == (64, 70)


def test_constant_groups_come_back_exactly() -> None:
    states = torch.full((1, 32, 8), 0.3, dtype=torch.float16)
    for side in ("key", "value"):
        block = Kivi(bits=2).pack(states, side, None)
        assert (block.scale == 1).all()
        assert torch.equal(block.restore(), states)


def test_tokens_that_fill_no_group_are_exact() -> None:
    states = torch.randn(2, 41, 8)
    block = Kivi(bits=2, group=16, residual=16).pack(states, "key", None)
    assert torch.equal(block.restore()[:, 32:], states[:, 32:])
    assert not torch.equal(block.restore()[:, :32], states[:, :32])


def test_channels_that_fill_no_group_make_a_smaller_one() -> None:
    states = torch.randn(1, 3, 20)
    block = Kivi(bits=8, group=16, residual=16).pack(states, "value", None)
    assert [tuple(part.scale.shape) for part in block.parts] == [(1, 3, 1), (1, 3, 1)]
    assert (block.restore() - states).abs().max() < 0.02


def test_visual_entries_get_their_own_bits_and_all_stay_in_order() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 50, 8)
    image = list(range(5, 42))
    for method in (Kivi(bits=8, visual_bits=2, group=16, residual=16), Kivi(bits=8, group=16, residual=16)):
        for side in ("key", "value"):
            error = (method.pack(states, side, prompt(states, image)).restore() - states).abs().amax(dim=(0, 2))
            visual = error[5:37] if side == "key" else error[5:42]
            assert error[:5].max() < 0.05
            assert error[42:].max() < 0.05
            assert (visual > 0.05).all() == (method.visual_bits == 2)
    # 37 visual entries are two groups and five, 13 of text are no group.
    exact = Kivi(bits=8, visual_bits=2, group=16, residual=16).pack(states, "key", prompt(states, image)).restore()
    loose = [*range(5), *range(37, 50)]
    assert torch.equal(exact[:, loose], states[:, loose])


def test_visual_values_per_channel_are_closer_where_channels_differ() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 64, 32) + torch.randn(2, 1, 32) * 20
    entries = prompt(states, list(range(64)))
    errors = [
        (Kivi(bits=2, values_per_channel=choice).pack(states, "value", entries).restore() - states).norm()
        for choice in (False, True)
    ]
    assert errors[1] < errors[0] / 5
    generated = Kivi(bits=2, values_per_channel=True).pack(states, "value", None).restore()
    assert (generated - states).norm() == errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("visual", [[], [0], None])
def test_blocks_of_any_size_keep_shape_and_dtype(dtype: torch.dtype, tokens: int, visual: list[int] | None) -> None:
    states = torch.randn(1, tokens, 10).to(dtype)
    entries = None if visual is None else prompt(states, visual if tokens else [])
    for side in ("key", "value"):
        restored = Kivi(bits=2, visual_bits=4, values_per_channel=True).pack(states, side, entries).restore()
        assert (restored.shape, restored.dtype) == (states.shape, dtype)
        assert restored.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits=3 must be one of 2, 4, 8"),
        ({"bits": 4.0}, "bits=4.0 must be one of"),
        ({"visual_bits": 1}, "visual_bits=1 must be one of"),
        ({"group": 0}, "group=0 must be an int of at least 1"),
        ({"residual": 100}, "residual=100 must be a multiple of group=32"),
        ({"residual": -1}, "residual=-1 must be an int of at least 0"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kivi(**options)
