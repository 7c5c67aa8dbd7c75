"""Recycled attention: when a step is full, and what it hands on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfast.kv.entries import Step
from mmfast.registry import get

KEYS = torch.tensor([[[5.0, 0.0], [0.0, 5.0], [3.0, 0.0], [0.0, 0.0], [9.0, 9.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
RIGHT, UP = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])


def read(method: object, queries: list[Tensor]) -> list[list[int] | None]:
    memory: dict[str, Tensor] = {}
    found: list[list[int] | None] = []
    for added, query in enumerate(queries, start=1):
        keys = KEYS[:, : 4 + added]
        step = Step(keys, keys, query, seen=4 + added, added=added, layer=2, memory=memory)
        chosen = method.choose(step)  # type: ignore[attr-defined]
        found.append(None if chosen is None else chosen[0].nonzero().squeeze(-1).tolist())
    return found


def test_generated_entries_compete_with_those_of_the_prompt() -> None:
    method = get("recycled_attention").method(keep=2, stride=3, recent=0)
    # Entry 4, the first generated one, is what the first step itself attends to most.
    assert read(method, [RIGHT, UP, UP, UP]) == [None, [0, 4, 5], [0, 4, 5, 6], None]
    assert read(get("recycled_attention").method(keep=1, stride=3, recent=2), [RIGHT, UP, UP]) == [
        None,
        [4, 5],
        [4, 5, 6],
    ]


def test_a_query_unlike_that_of_the_last_full_step_makes_the_next() -> None:
    method = get("recycled_attention").method(keep=2, recent=0, similarity=0.5)
    assert read(method, [RIGHT, RIGHT, UP, UP]) == [None, [0, 4, 5], None, [1, 4, 7]]


def test_dense_layers_read_everything_and_a_full_share_hands_on_everything() -> None:
    assert read(get("recycled_attention").method(keep=1, dense_layers=3), [RIGHT, UP]) == [None, None]
    method = get("recycled_attention").method(keep=1.0, recent=0)
    assert read(method, [RIGHT, UP]) == [None, [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("options", [{"stride": 0}, {"recent": -1}, {"similarity": 2.0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        get("recycled_attention").method(**options)
