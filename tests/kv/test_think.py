"""ThinK: the channels that add least to the logits are not stored."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.packing.think import ThinK


def test_by_hand() -> None:
    keys = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 6, 4).contiguous()
    query = torch.ones(2, 6, 4)
    # Only the last queries count: channel 3 means much to the keys, and nothing to them.
    query[:, -2:, 3] = 0
    query[:, :4, 0] = 99
    entries = Entries.of(keys, keys, query)
    method = ThinK(drop=0.5, window=2)
    assert method.score(keys, entries).tolist() == [[1.0, 4.0, 9.0, 0.0]]
    assert method.pack(keys, "key", entries).restore()[0, 0].tolist() == [0.0, 2.0, 3.0, 0.0]


def test_logits_lose_only_what_the_dropped_channels_add() -> None:
    torch.manual_seed(0)
    keys = torch.randn(2, 40, 16) * torch.tensor([5.0] * 8 + [0.01] * 8)
    query = torch.randn(4, 40, 16)
    restored = ThinK(drop=0.5).pack(keys, "key", Entries.of(keys, keys, query)).restore()
    assert torch.equal(restored[..., :8], keys[..., :8])
    assert not restored[..., 8:].any()


def test_heads_choose_for_themselves_and_ties_go_to_the_lower_channel() -> None:
    keys = torch.ones(2, 5, 4)
    keys[1, :, 2] = 3
    block = ThinK(drop=0.5).pack(keys, "key", Entries.of(keys, keys, torch.ones(4, 5, 4)))
    assert block.channels.tolist() == [[0, 1], [0, 2]]


def test_stored_keys_are_narrower_to_the_byte() -> None:
    keys = torch.randn(2, 40, 16, dtype=torch.bfloat16)
    block = ThinK(drop=0.7).pack(keys, "key", Entries.of(keys, keys, keys))
    assert sum(tensor.numel() * tensor.element_size() for tensor in block.tensors()) == 2 * 40 * 5 * 2 + 2 * 5 * 2


def test_values_and_generated_keys_stay() -> None:
    states = torch.randn(2, 40, 16)
    entries = Entries.of(states, states, states)
    assert torch.equal(ThinK().pack(states, "value", entries).restore(), states)
    assert torch.equal(ThinK().pack(states, "key", None).restore(), states)
    assert torch.equal(ThinK(drop=0.0).pack(states, "key", entries).restore(), states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_blocks_of_any_size_keep_shape_and_dtype(dtype: torch.dtype, tokens: int) -> None:
    states = torch.randn(1, tokens, 5).to(dtype)
    entries = Entries.of(states, states, torch.randn(3, tokens, 5).to(dtype))
    restored = ThinK(drop=0.9).pack(states, "key", entries).restore()
    assert (restored.shape, restored.dtype) == (states.shape, dtype)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"drop=1\.0 must be at least 0 and below 1"):
        ThinK(drop=1.0)
    with pytest.raises(ValueError, match="window=0 must be an int of at least 1"):
        ThinK(window=0)
