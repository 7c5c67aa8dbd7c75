"""Eight-bit floats: off by a sixteenth of a number at most."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.packing.fp8 import Fp8


def test_by_hand() -> None:
    block = Fp8().pack(torch.tensor([[[448.0, -17.0, 0.0, 1.0]]]), "key", None)
    assert block.codes.dtype == torch.float8_e4m3fn
    # Between 16 and 32 there is every second number; halves go to the even one.
    assert block.restore().tolist() == [[[448.0, -16.0, 0.0, 1.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", ["key", "value"])
def test_no_number_is_off_by_more_than_a_sixteenth(dtype: torch.dtype, side: str) -> None:
    torch.manual_seed(0)
    states = (torch.randn(2, 50, 32) * torch.logspace(-2, 2, 50)[:, None]).to(dtype)
    block = Fp8().pack(states, side, None)
    # The smallest step of the format is 2 ** -9, and what is restored is rounded to the dtype once more.
    limit = states.float().abs() * (1 / 16 + torch.finfo(dtype).eps) + block.scale.float() * 2**-10
    assert ((block.restore().float() - states.float()).abs() <= limit * 1.001).all()


def test_what_is_stored_is_counted_to_the_byte() -> None:
    block = Fp8().pack(torch.randn(2, 50, 32, dtype=torch.bfloat16), "key", None)
    assert sum(tensor.numel() * tensor.element_size() for tensor in block.tensors()) == 2 * 50 * (32 + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_empty_and_zero_blocks_come_back(dtype: torch.dtype) -> None:
    for states in (torch.zeros(2, 0, 8, dtype=dtype), torch.zeros(1, 3, 8, dtype=dtype)):
        restored = Fp8().pack(states, "value", None).restore()
        assert restored.dtype == dtype
        assert torch.equal(restored, states)


def test_the_newest_entries_are_left_alone() -> None:
    assert [Fp8(residual=4).due(loose, "value") for loose in (3, 4, 9)] == [0, 0, 5]
