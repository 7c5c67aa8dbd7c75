"""Bookkeeping of cache layers that store fewer tokens than were passed."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from mmfast.adapters.cache import LogicalLayer, LogicalSlidingLayer, adopt, is_logical
from mmfast.kv.cache import Announcement


def states(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.arange(batch * tokens, dtype=torch.float32).view(batch, 1, tokens, 1)
    return keys, keys + 0.5


def pruned_layer() -> LogicalLayer:
    """Ten logical tokens of which rows keep 0, 3, 9 and (padding), 5, 9."""
    layer = LogicalLayer()
    layer.announced = Announcement(
        10, torch.tensor([[True, True, True], [False, True, True]]), torch.tensor([[0, 3, 9], [1, 5, 9]])
    )
    layer.update(*states(2, 3))
    return layer


def follow(layer: LogicalLayer, tokens: int) -> None:
    """Store tokens after the prompt, as a plan at work announces them."""
    layer.announced = Announcement(tokens, None, torch.arange(tokens).expand(2, tokens))
    layer.update(*states(2, tokens))


def test_the_outside_sees_the_logical_length() -> None:
    layer = pruned_layer()
    assert (layer.get_seq_length(), layer.stored) == (10, 3)
    assert layer.get_mask_sizes(2) == (5, 7)
    follow(layer, 1)
    assert (layer.get_seq_length(), layer.stored) == (11, 4)
    assert layer.slots.tolist() == [[0, 3, 9, 10], [1, 5, 9, 10]]
    assert layer.valid.tolist() == [[True, True, True, True], [False, True, True, True]]


def test_generated_tokens_can_be_taken_back_but_pruned_ones_cannot() -> None:
    layer = pruned_layer()
    follow(layer, 4)
    layer.crop(-3)
    assert (layer.get_seq_length(), layer.stored, layer.valid.shape[1]) == (11, 4, 4)
    layer.crop(0)
    layer.crop(10)
    assert layer.get_seq_length() == 10
    with pytest.raises(ValueError, match="cannot take back 2 tokens"):
        layer.crop(-2)
    assert (layer.get_seq_length(), layer.stored) == (10, 3)


def test_a_pruned_prompt_is_not_continued_unannounced() -> None:
    layer = pruned_layer()
    with pytest.raises(ValueError, match="can only be continued while a plan is at work on the model"):
        layer.update(*states(2, 1))
    assert (layer.get_seq_length(), layer.stored) == (10, 3)


def test_beams_move_every_book() -> None:
    layer = pruned_layer()
    layer.shift = torch.tensor([7, 8])
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.slots[0].tolist() == [1, 5, 9]
    assert layer.valid[0].tolist() == [False, True, True]
    assert layer.shift.tolist() == [8, 8]
    layer.batch_repeat_interleave(2)
    assert layer.slots.shape[0] == layer.keys.shape[0] == layer.valid.shape[0] == 4
    layer.batch_select_indices(torch.tensor([True, False, False, True]))
    assert layer.slots.shape[0] == layer.keys.shape[0] == layer.shift.shape[0] == 2


def test_layers_with_equal_notes_share_their_history() -> None:
    first, second, third = LogicalLayer(), LogicalLayer(), LogicalLayer()
    for layer, level in ((first, 0), (second, 0), (third, 2)):
        layer.announced = Announcement(4, None, torch.arange(4)[None], level)
        layer.update(*states(1, 4))
    assert first.history == second.history != third.history


def test_a_filled_cache_keeps_its_tokens_when_adopted() -> None:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*states(1, 5), layer)
    adopt(cache, 3, torch.tensor([[False, True, True, True, True]]))
    assert is_logical(cache)
    assert len(cache.layers) == 3
    assert cache.get_seq_length() == 5
    assert cache.layers[0].valid.tolist() == [[False, True, True, True, True]]
    assert cache.layers[2].get_seq_length() == 0
    cache.layers[0].reset()
    assert cache.get_seq_length() == 0


def test_sliding_layers_store_what_is_kept() -> None:
    layer = LogicalSlidingLayer(4)
    layer.update(*states(1, 9))
    assert (layer.stored, layer.get_seq_length(), layer.is_sliding) == (9, 9, True)
    assert layer.get_mask_sizes(1) == (10, 0)
