"""VASparse: the two halves of its score."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.vasparse import visual_saliency
from mmfast.registry import get
from mmfast.token_pruning.attention import AttentionView


def test_saliency_compares_what_tokens_give_to_visual_ones() -> None:
    view = AttentionView(torch.zeros(2, 4, 2), torch.zeros(1, 4, 2))
    visual = torch.tensor([False, True, True, False])
    # Even attention: 0 of 1, 1 of 2, 2 of 3 and 2 of 4 entries seen are visual.
    expected = torch.tensor([0.0, 1 / 2, 2 / 3, 1 / 2]).softmax(dim=0)
    assert torch.allclose(visual_saliency(view, visual), expected)


def prompt() -> Entries:
    keys = torch.tensor([[[1.0], [0.0], [-3.0], [2.0], [0.0]]])
    return Entries.of(keys, keys, torch.zeros(2, 5, 1), visual=torch.tensor([False, True, False, False, False]))


def read(entries: Entries, query: list[float], keep: int, weight: float) -> list[int]:
    method = get("vasparse").method(keep=keep, visual_weight=weight, dense_layers=0)
    method.prepare(entries)
    keys = torch.cat([entries.keys, torch.zeros(1, 1, 1)], dim=1)
    step = Step(keys, keys, torch.tensor(query).view(2, 1, 1), seen=6, memory=entries.memory)
    return method.choose(step).nonzero().squeeze(-1).tolist()


def test_products_count_by_their_square_and_heads_by_their_mean() -> None:
    # Squares of the products: 1, 0, 9, 4, 0, whatever the sign of either head.
    assert read(prompt(), [1.0, -1.0], 2, 0.0) == [2, 3, 5]
    assert read(prompt(), [0.0, 1.0], 3, 0.0) == [0, 2, 3, 5]


def test_what_looked_at_the_image_is_read_where_the_query_does_not_care() -> None:
    # What the tokens give to entry 1: nothing, 1/2, 1/3, 1/4 and 1/5.
    assert read(prompt(), [0.0, 0.0], 2, 1.0) == [1, 2, 5]
    assert read(prompt(), [1.0, 1.0], 2, 1.0) == [2, 3, 5]
    assert read(prompt(), [1.0, 1.0], 2, 1000.0) == [1, 2, 5]


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="visual_weight=-1"):
        get("vasparse").method(visual_weight=-1)
