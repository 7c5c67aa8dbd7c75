"""Mustafar: the larger numbers survive exactly, and only they are stored."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.packing.mustafar import Mustafar


def test_by_hand() -> None:
    states = torch.tensor([[[1.0, -4.0, 2.0, 3.0], [5.0, 0.5, -5.0, 5.0]]])
    # Two of four go, but the number at the threshold stays; so do all that are as large.
    assert Mustafar(sparsity=0.5).pack(states, "key", None).restore().tolist() == [
        [[0.0, -4.0, 2.0, 3.0], [5.0, 0.0, -5.0, 5.0]]
    ]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("width", [1, 7, 8, 80])
def test_survivors_are_exact_and_as_many_as_promised(sparsity: float, width: int) -> None:
    torch.manual_seed(width)
    states = torch.randn(2, 30, width)
    block = Mustafar(sparsity=sparsity).pack(states, "value", None)
    restored = block.restore()
    kept = restored != 0
    assert torch.equal(restored[kept], states[kept])
    assert (kept.sum(dim=-1) == width - max(1, int(sparsity * width)) + 1).all()
    assert (states.abs().masked_fill(kept, 0).amax(dim=-1) <= restored.abs().masked_fill(~kept, 99).amin(dim=-1)).all()


def test_what_is_stored_is_counted_to_the_byte() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 50, 20).to(torch.float16)
    block = Mustafar(sparsity=0.5).pack(states, "key", None)
    survivors = int(Mustafar(sparsity=0.5).survivors(states).sum())
    assert sum(tensor.numel() * tensor.element_size() for tensor in block.tensors()) == 2 * 50 * 3 + survivors * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_empty_and_zero_blocks_come_back(dtype: torch.dtype) -> None:
    for states in (torch.zeros(2, 0, 9, dtype=dtype), torch.zeros(1, 3, 9, dtype=dtype)):
        restored = Mustafar().pack(states, "value", None).restore()
        assert restored.dtype == dtype
        assert torch.equal(restored, states)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"sparsity=1\.0 must be at least 0 and below 1"):
        Mustafar(sparsity=1.0)
