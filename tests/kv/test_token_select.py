"""TokenSelect: the vote, the ends, and votes that are taken over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfast.kv.entries import Step
from mmfast.registry import get


def step(keys: Tensor, query: Tensor, added: int, memory: dict[str, Tensor]) -> Step:
    return Step(keys, keys, query, seen=keys.shape[1], added=added, memory=memory)


def test_heads_vote_with_probabilities_and_not_with_logits() -> None:
    # One head is sure of entry 1 and gives no more than one vote; two heads lean to entry 2 with 0.88 each.
    keys = torch.tensor([[[0.0, 0.0], [9.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    query = torch.tensor([[[1.0, 0.0]], [[0.0, 1.5]], [[0.0, 1.5]]])
    method = get("token_select").method(keep=1, first=0, local=0, dense_layers=0)
    assert method.choose(step(keys, query, 1, {})).tolist() == [False, False, True, True]


def test_the_window_moves_on_with_what_is_generated() -> None:
    keys = torch.zeros(1, 12, 2)
    keys[:, 4] = 9.0
    method = get("token_select").method(keep=5, first=1, local=3, dense_layers=0, reuse=None)
    query = torch.ones(1, 1, 2)
    # One of the three newest entries is new: two of the prompt are left, and one more is voted for.
    assert method.choose(step(keys[:, :11], query, 1, {})).nonzero().squeeze(-1).tolist() == [0, 1, 4, 8, 9, 10]
    assert method.choose(step(keys, query, 2, {})).nonzero().squeeze(-1).tolist() == [0, 1, 2, 4, 9, 10, 11]


def test_a_vote_is_taken_over_by_queries_much_like_it() -> None:
    keys = torch.tensor([[[1.0, 0.0], [0.95, 0.3], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]])
    method = get("token_select").method(keep=1, first=0, local=0, dense_layers=0)
    memory: dict[str, Tensor] = {}
    first = method.choose(step(keys[:, :4], torch.tensor([[[1.0, 0.0]]]), 1, memory))
    assert first.tolist() == [True, False, False, True]
    # Its own vote would be entry 1.
    like = method.choose(step(keys, torch.tensor([[[1.0, 0.4]]]), 2, memory))
    assert like.tolist() == [True, False, False, True, True]
    own = get("token_select").method(keep=1, first=0, local=0, dense_layers=0, reuse=None)
    assert own.choose(step(keys, torch.tensor([[[1.0, 0.4]]]), 2, {})).tolist() == [False, True, False, True, True]
    other = method.choose(step(keys, torch.tensor([[[0.0, 1.0]]]), 2, memory))
    assert other.tolist() == [False, False, True, True, True]


def test_entries_that_do_not_exist_get_no_votes() -> None:
    keys = torch.tensor([[[9.0], [1.0], [0.0], [0.0]]])
    real = torch.tensor([[False, True, True, True]])
    method = get("token_select").method(keep=1, first=0, local=0, dense_layers=0)
    chosen = method.choose(Step(keys, keys, torch.ones(1, 1, 1), seen=4, real=real))
    assert chosen.tolist() == [False, True, False, True]


@pytest.mark.parametrize("options", [{"first": -1}, {"local": 0.5}, {"kernel": 4}, {"reuse": 1.5}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        get("token_select").method(**options)
