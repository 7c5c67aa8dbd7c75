"""Key re-rotation: survivors stand where a shorter prompt would have put them."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries, Retained, rotate
from mmfast.registry import get
from support.entries import rotary

REROTATION = get("key_rerotation").method


@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("kept", [[[1, 0, 0, 1, 1, 0, 1]] * 2, [[0, 0, 0, 0, 0, 0, 1], [1, 1, 0, 1, 1, 1, 1]]])
def test_keys_are_those_of_the_survivors_alone(kept: list[list[int]], rotated: int) -> None:
    plain = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
    rotation = rotary(7, rotated, 10000.0)
    entries = Entries.of(rotate(plain, rotation.cos, rotation.sin), plain, rotation=rotation)
    mask = torch.tensor(kept).bool()
    found = REROTATION().adjust(entries, Retained(mask))
    for head in range(2):
        alone = plain[head, mask[head]]
        expected = rotate(alone, rotation.cos[: len(alone)], rotation.sin[: len(alone)])
        assert torch.allclose(found.keys[head, mask[head]], expected, atol=1e-5)
    assert found.values is None


def test_changed_keys_dtype_and_bias_are_carried_along() -> None:
    rotation = rotary(3, 2, 100.0)
    keys, other = torch.zeros(1, 3, 2).half(), torch.ones(1, 3, 2).half()
    bias = torch.zeros(1, 3)
    retained = Retained(torch.tensor([True, True, False]), keys=other, bias=bias)
    found = REROTATION().adjust(Entries.of(keys, keys, rotation=rotation), retained)
    assert found.keys.dtype == torch.half
    assert found.bias is bias
    # The first two stay where they were.
    assert torch.allclose(found.keys[:, :2], other[:, :2], atol=1e-3)
