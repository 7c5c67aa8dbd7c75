"""Layers of static caches: what stands in their buffers, and where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfast.adapters.static import StaticLogicalLayer
from mmfast.kv.cache import Announcement
from mmfast.kv.static import STEP


def states(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    keys = torch.arange(batch * tokens, dtype=torch.float32).view(batch, 1, tokens, 1)
    return keys, keys + 0.5


def settled(limit: int, tokens: int = 10, batch: int = 2) -> StaticLogicalLayer:
    """A layer with a prompt, of which rows keep the places 0, 3, 9 and (padding), 5, 9."""
    layer = StaticLogicalLayer(limit)
    layer.announced = Announcement(
        tokens, torch.tensor([[True, True, True], [False, True, True]]), torch.tensor([[0, 3, 9], [1, 5, 9]])
    )
    layer.update(*states(batch, 3))
    assert layer.capacity == 0
    layer.settle()
    return layer


def follow(layer: StaticLogicalLayer, tokens: int) -> None:
    layer.announced = Announcement(tokens, None, torch.arange(tokens).expand(2, tokens))
    layer.update(*states(2, tokens))


def test_what_does_not_fit_moves() -> None:
    layer = settled(limit=20)
    assert (layer.capacity, layer.limit, layer.get_seq_length(), layer.stored) == (STEP, 20, 10, 3)
    place = layer.keys.data_ptr()
    follow(layer, STEP - 3)
    assert (layer.capacity, layer.keys.data_ptr(), int(layer.filled)) == (STEP, place, STEP)
    follow(layer, 1)
    assert (layer.capacity, layer.stored, int(layer.filled)) == (2 * STEP, STEP + 1, STEP + 1)
    assert layer.keys[0, 0, :3, 0].tolist() == [0, 1, 2]
    assert layer.keys[0, 0, 3:STEP, 0].tolist() == list(range(STEP - 3))


def test_rows_are_reordered_in_place_and_repeated_elsewhere() -> None:
    layer = settled(limit=20)
    place = layer.values.data_ptr()
    layer.reorder_cache(torch.tensor([1, 1]))
    assert (layer.values.data_ptr(), layer.values[0, 0, :, 0].tolist()) == (place, [3.5, 4.5, 5.5])
    layer.batch_repeat_interleave(2)
    assert (layer.keys.shape[0], layer.capacity, int(layer.filled)) == (4, STEP, 3)
    layer.batch_select_indices(torch.tensor([0, 2, 3]))
    assert (layer.keys.shape[0], layer.slots.shape[0], layer.capacity) == (3, 3, STEP)


def test_entries_are_thinned_out_and_cut_off_in_place() -> None:
    layer = settled(limit=20)
    follow(layer, 4)
    place = layer.keys.data_ptr()
    layer.crop(-1)
    assert (layer.stored, int(layer.filled), layer.keys.data_ptr()) == (6, 6, place)
    keep = layer.real_entries().clone()
    keep[:, :, 4] = False
    layer.compact(keep)
    assert (layer.stored, int(layer.filled), layer.keys.data_ptr()) == (5, 5, place)
    assert layer.keys[0, 0, :, 0].tolist() == [0, 1, 2, 0, 2]
    assert layer.values[1, 0, 1:, 0].tolist() == [4.5, 5.5, 4.5, 6.5]


def test_part_of_a_buffer_may_be_moved_within_it() -> None:
    layer = settled(limit=20)
    place = layer.keys.data_ptr()
    layer.keys = layer.keys[:, :, 1:]
    layer.values = layer.values[:, :, 1:]
    assert (layer.keys[0, 0, :, 0].tolist(), layer.keys.data_ptr()) == ([1, 2], place)
    assert layer.values[1, 0, :, 0].tolist() == [4.5, 5.5]


def test_a_layer_begins_anew() -> None:
    layer = settled(limit=20)
    layer.reset()
    assert (layer.keys, layer.filled, layer.capacity, layer.get_seq_length()) == (None, None, 0, 0)
    layer.update(*states(2, 5))
    layer.settle()
    assert (layer.stored, layer.capacity, layer.get_max_length()) == (5, STEP, 20)
    with pytest.raises(RuntimeError, match="no buffers to write to before settle"):
        StaticLogicalLayer(20).write(*states(2, 1))


def test_drafted_tokens_that_stay_move_together_in_place() -> None:
    layer = settled(limit=20)
    follow(layer, 4)
    place = layer.keys.data_ptr()
    layer.keep_block(4, torch.tensor([[0, 2], [1, 3]]), None)
    assert (layer.stored, int(layer.filled), layer.get_seq_length(), layer.keys.data_ptr()) == (5, 5, 12, place)
    assert layer.keys[:, 0, 3:, 0].tolist() == [[0, 2], [5, 7]]
