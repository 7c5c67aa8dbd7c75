"""HoliTom inside the language model: the order of merging."""

from __future__ import annotations

import torch

from mmfast.token_pruning.in_llm.holitom_inner import merge_in_turn
from mmfast.token_pruning.similarity import most_similar


def test_merging_in_turn_equals_a_loop() -> None:
    states = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([3, 8, 21])
    wanted = states[kept].clone()
    dropped = [index for index in range(40) if index not in kept.tolist()]
    for index, target in zip(dropped, most_similar(states[dropped], states[kept]).tolist(), strict=True):
        wanted[target] = (wanted[target] + states[index]) / 2
    assert torch.allclose(merge_in_turn(states, kept), wanted, atol=1e-6)


def test_what_nothing_joins_is_left_untouched() -> None:
    states = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    merged = merge_in_turn(states, torch.tensor([0, 1]))
    assert merged[0].tolist() == [1.5, 0.0]
    assert bool(merged[1].isnan().all())


def test_hundreds_that_join_one_do_not_overflow() -> None:
    states = torch.ones(3000, 2, dtype=torch.float16)
    assert merge_in_turn(states, torch.tensor([0])).tolist() == [[1.0, 1.0]]
