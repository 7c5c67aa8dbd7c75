"""Eight-bit integers: off by half a code at most."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.packing.int8 import Int8


def test_by_hand() -> None:
    block = Int8().pack(torch.tensor([[[12.7, -0.1, 0.04, 0.0]]]), "key", None)
    assert block.codes.tolist() == [[[127, -1, 0, 0]]]
    torch.testing.assert_close(block.restore(), torch.tensor([[[12.7, -0.1, 0.0, 0.0]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", ["key", "value"])
def test_no_number_is_off_by_more_than_half_a_code(dtype: torch.dtype, side: str) -> None:
    torch.manual_seed(0)
    states = (torch.randn(2, 50, 32) * torch.logspace(-2, 2, 50)[:, None]).to(dtype)
    block = Int8().pack(states, side, None)
    # What is restored is rounded to the dtype once more.
    rounding = states.float().abs() * torch.finfo(dtype).eps
    assert ((block.restore().float() - states.float()).abs() <= block.scale.float() / 2 * 1.001 + rounding).all()


def test_what_is_stored_is_counted_to_the_byte() -> None:
    block = Int8().pack(torch.randn(2, 50, 32, dtype=torch.bfloat16), "key", None)
    assert sum(tensor.numel() * tensor.element_size() for tensor in block.tensors()) == 2 * 50 * (32 + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_empty_and_zero_blocks_come_back(dtype: torch.dtype) -> None:
    for states in (torch.zeros(2, 0, 8, dtype=dtype), torch.zeros(1, 3, 8, dtype=dtype)):
        restored = Int8().pack(states, "value", None).restore()
        assert restored.dtype == dtype
        assert torch.equal(restored, states)


def test_the_newest_entries_are_left_alone() -> None:
    assert [Int8(residual=4).due(loose, "key") for loose in (3, 4, 9)] == [0, 0, 5]
    with pytest.raises(ValueError, match="residual=True must be an int"):
        Int8(residual=True)
