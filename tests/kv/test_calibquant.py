"""CalibQuant: visual entries in few bits, text as it is."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.packing.calibquant import CalibQuant


def prompt(states: torch.Tensor, visual: range) -> Entries:
    mask = torch.zeros(states.shape[1], dtype=torch.bool)
    mask[list(visual)] = True
    return Entries.of(states, states, visual=mask)


def test_one_bit_by_hand() -> None:
    states = torch.tensor([-4.0, -1.0, 1.0, 4.0]).view(1, 4, 1)
    assert CalibQuant().quantise(states, "key").restore().flatten().tolist() == [-2.0, -2.0, 2.0, 2.0]
    values = CalibQuant().quantise(states, "value").restore().flatten()
    torch.testing.assert_close(values, torch.tensor([-1.2, -1.2, 1.2, 1.2]))
    whole = CalibQuant(key_range=1.0).quantise(states, "key").restore().flatten()
    assert whole.tolist() == [-4.0, -4.0, 4.0, 4.0]


def test_channels_of_one_sign_keep_their_offset() -> None:
    torch.manual_seed(0)
    states = torch.rand(1, 100, 8) + 10
    ours = CalibQuant().quantise(states, "key").restore()
    official = CalibQuant(compat="official").quantise(states, "key").restore()
    assert (ours - states).abs().max() < 0.6
    assert (official - states).abs().min() > 4


def test_the_two_ways_agree_where_a_channel_has_mean_zero() -> None:
    states = torch.randn(2, 50, 8)
    states = torch.cat([states, -states], dim=1)
    ours, official = (CalibQuant(compat=compat).quantise(states, "value").restore() for compat in (None, "official"))
    torch.testing.assert_close(ours, official)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_from_two_bits_on_no_number_is_off_by_more_than_half_a_code(bits: int) -> None:
    states = torch.randn(2, 60, 8)
    block = CalibQuant(bits=bits).quantise(states, "value")
    assert ((block.restore() - states).abs() <= block.scale / 2 * 1.001 + 1e-6).all()


def test_a_block_may_share_one_range() -> None:
    states = torch.randn(2, 60, 8)
    block = CalibQuant(bits=2, per_channel=False).quantise(states, "key")
    assert block.scale.numel() == 1
    assert ((block.restore() - states).abs() <= block.scale / 2 * 1.001).all()


def test_text_and_generated_entries_stay() -> None:
    states = torch.randn(2, 50, 8, dtype=torch.float16)
    for side in ("key", "value"):
        block = CalibQuant().pack(states, side, prompt(states, range(10, 42)))
        restored = block.restore()
        assert torch.equal(restored[:, :10], states[:, :10])
        assert torch.equal(restored[:, 42:], states[:, 42:])
        assert not torch.isin(restored[:, 10:42], states[:, 10:42]).all()
        assert torch.equal(CalibQuant().pack(states, side, None).restore(), states)
        # 32 tokens are one word per channel and head; two numbers per channel; 18 tokens of text; the mask.
        stored = sum(tensor.numel() * tensor.element_size() for tensor in block.tensors())
        assert stored == 16 * 4 + 16 * 2 * 2 + 18 * 16 * 2 + 50


def test_constant_channels_come_back() -> None:
    states = torch.full((1, 9, 4), 3.25)
    assert torch.equal(CalibQuant().quantise(states, "key").restore(), states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_blocks_of_any_size_keep_shape_and_dtype(dtype: torch.dtype, tokens: int) -> None:
    states = torch.randn(1, tokens, 5).to(dtype)
    for visual in (range(0), range(tokens), range(tokens // 2)):
        restored = CalibQuant().pack(states, "key", prompt(states, visual)).restore()
        assert (restored.shape, restored.dtype) == (states.shape, dtype)
        assert restored.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits=3 must be one of 1, 2, 4, 8"),
        ({"key_range": 0.0}, "key_range=0.0 must be above 0"),
        ({"value_range": 1.2}, "value_range=1.2 must be above 0"),
        ({"compat": "paper"}, "compat='paper' must be one of"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibQuant(**options)
