"""CoreMatching: the rule of the paper by hand, and curves without an elbow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast.token_pruning.in_llm.corematching import CoreMatching, above_elbow, most_frequent, strongest
from mmfast.token_pruning.layers import LayerEvent
from support.inside import layer_tokens

EVENT = LayerEvent(3, 0, 8)

ACTIVATIONS = torch.tensor(
    [
        [5.0, 1.0, -1.0, 4.0],  # of three positive entries the strongest two: 0, 3
        [3.0, 2.0, 1.0, -9.0],  # 0, 1
        [-1.0, -2.0, -3.0, 7.0],  # 3 is all there is
        [-1.0, -1.0, -1.0, -1.0],  # none
        [9.0, 8.0, 7.0, 6.0],  # 0, 1
    ]
)


def test_the_rule_of_the_paper_by_hand() -> None:
    """Neuron 0 is active in three tokens, 1 and 3 in two each: the core of two is 0 and, by index, 1."""
    tokens = layer_tokens(5, [0, 1, 2, 3], activations=ACTIVATIONS)
    method = CoreMatching(rule="paper", active=0.5, core=0.5)
    assert method.matches(tokens).tolist() == [1.0, 2.0, 0.0, 0.0]
    for keep, kept in [(1, [1]), (2, [0, 1]), (0.75, [0, 1, 2])]:
        found = CoreMatching(rule="paper", active=0.5, core=0.5, keep=keep)(tokens, EVENT)
        assert found is not None
        assert found.indices.tolist() == kept


def test_the_rule_of_the_code_reads_one_token_near_the_end() -> None:
    tokens = layer_tokens(5, [0, 1, 2, 3], activations=ACTIVATIONS)
    assert CoreMatching(rule="sign", query_offset=-3).matches(tokens).tolist() == [1.0, 0.0, 1.0, 0.0]
    # A prompt shorter than the offset has its first token read, and one that goes on is read up to its end.
    first = [3.0, 2.0, 1.0, 0.0]
    assert CoreMatching(rule="sign", query_offset=-50).matches(tokens).tolist() == first
    drafted = layer_tokens(5, [0, 1, 2, 3], activations=ACTIVATIONS, last=2)
    assert CoreMatching(rule="sign", query_offset=-1).matches(drafted).tolist() == [1.0, 0.0, 1.0, 0.0]


@given(values=st.lists(st.integers(0, 9), min_size=1, max_size=12), slope=st.integers(0, 3))
def test_without_an_elbow_everything_stays(values: list[int], slope: int) -> None:
    straight = torch.arange(len(values), 0, -1) * slope
    assert above_elbow(straight.float()).tolist() == []
    activations = torch.ones(len(values) + 1, 4)
    tokens = layer_tokens(len(values) + 1, range(len(values)), activations=activations)
    for rule in ("sign", "paper"):
        assert CoreMatching(rule=rule)(tokens, EVENT) is None


def test_strongest_takes_an_exact_number_among_equals() -> None:
    marked = strongest(torch.tensor([[1.0, 1.0, 1.0, 1.0, -1.0]], dtype=torch.bfloat16), 0.5)
    assert marked.tolist() == [[True, True, False, False, False]]


def test_a_core_is_never_empty() -> None:
    assert most_frequent(torch.zeros(3, 5, dtype=torch.bool), 0.01).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(
    "options", [{"rule": "code"}, {"active": 0.0}, {"core": 1.5}, {"query_offset": 0}, {"keep": 0}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}="):
        CoreMatching(**options)


def test_activations_are_needed() -> None:
    with pytest.raises(ValueError, match="needs the activations of the layer before"):
        CoreMatching(keep=1)(layer_tokens(3, [0, 1]), EVENT)
