"""MustDrop inside the language model: what the official vectors do not say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.token_pruning.in_llm.mustdrop import MustDrop, threshold_margin
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from support.attention import DenseAttention
from support.inside import layer_tokens

FIRST = LayerEvent(3, 0, 32)


def prompt(rows: list[list[float]], cls_attention: list[float], **more: Any) -> LayerTokens:
    """Visual tokens and after them one text token for each row of attention to them."""
    visual, length = len(cls_attention), len(cls_attention) + len(rows)
    weights = torch.zeros(1, length, length)
    weights[0, visual:, :visual] = torch.tensor(rows)
    # The rest of its attention a text token gives to itself.
    weights[0, visual:, visual:] = torch.diag((1.0 - torch.tensor(rows).sum(dim=1)).clamp_min(0.0))
    signals = {"cls_attention": torch.tensor(cls_attention)}
    return layer_tokens(length, range(visual), attention=DenseAttention.of(weights), signals=signals, memory={}, **more)


def test_with_thresholds_a_token_goes_if_it_is_below_both() -> None:
    # Sums .1 .3 .3 .3 of 1.0, largest .05 .3 .15 .2.
    tokens = prompt([[0.05, 0.3, 0.15, 0.2], [0.05, 0.0, 0.15, 0.1]], [0.0, 0.0, 0.0, 0.0])
    options = {"keep": None, "key_share": 0.0}
    kept = MustDrop(global_threshold=0.35, individual_threshold=0.18, **options)(tokens, FIRST)
    assert kept is not None
    assert kept.indices.tolist() == [1, 3]
    assert MustDrop(global_threshold=0.05, individual_threshold=0.9, **options)(tokens, FIRST) is None


def test_at_least_one_token_survives_any_threshold() -> None:
    tokens = prompt([[0.1, 0.3, 0.2]], [0.0, 0.0, 0.0])
    kept = MustDrop(keep=None, key_share=0.0, global_threshold=1.0, individual_threshold=1.0)(tokens, FIRST)
    assert kept is not None
    assert kept.indices.tolist() == [1]


def test_key_tokens_never_go_and_are_remembered() -> None:
    method = MustDrop(keep=None, key_share=0.3, global_threshold=1.0, individual_threshold=1.0)
    tokens = prompt([[0.3, 0.2, 0.1, 0.2]], [0.1, 0.0, 0.5, 0.4])
    kept = method(tokens, FIRST)
    assert kept is not None
    assert kept.indices.tolist() == [2, 3]
    # Later the signal is not looked at again: the numbers of the tokens count.
    later = prompt([[0.3, 0.2, 0.1]], [9.0, 0.0, 0.0])
    later.memory.update(tokens.memory)
    moved = LayerTokens(**{**vars(later), "origin": torch.tensor([0, 1, 3]), "total": 4, "media_totals": (4,)})
    kept = method(moved, LayerEvent(7, 1, 32))
    assert kept is not None
    assert kept.indices.tolist() == [2]


def test_a_budget_goes_to_key_tokens_first_and_then_by_the_criterion() -> None:
    tokens = prompt([[0.1, 0.4, 0.2, 0.3]], [0.0, 0.0, 1.0, 0.9])
    for count, survivors in [(1, [2]), (2, [2, 3]), (3, [1, 2, 3])]:
        tokens.memory.clear()
        found = MustDrop(key_share=0.5).choose(tokens, count, FIRST)
        assert found.tolist() == sorted(survivors if count > 1 else [3])


@settings(deadline=None)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 1), min_size=9, max_size=9), min_size=n, max_size=n)
    ),
    global_threshold=st.floats(0.01, 0.5),
    individual_threshold=st.floats(0.01, 0.5),
)
def test_a_budget_equal_to_what_the_thresholds_leave_leaves_the_same(
    rows: list[list[float]], global_threshold: float, individual_threshold: float
) -> None:
    tokens = prompt(rows, [0.0] * 9)
    thresholds = {"global_threshold": global_threshold, "individual_threshold": individual_threshold, "key_share": 0.0}
    kept = MustDrop(keep=None, **thresholds)(tokens, FIRST)
    survivors = torch.arange(9) if kept is None else kept.indices
    assert MustDrop(**thresholds).choose(tokens, survivors.numel(), FIRST).equal(survivors)


@given(
    total=st.lists(st.floats(0, 4), min_size=1, max_size=12),
    largest=st.lists(st.floats(0, 1), min_size=12, max_size=12),
    bounds=st.tuples(st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.0, 0.2, 0.5])),
)
def test_the_margin_is_the_criterion(total: list[float], largest: list[float], bounds: tuple[float, float]) -> None:
    sums, most = torch.tensor(total), torch.tensor(largest[: len(total)])
    goes = (sums < bounds[0] * sums.sum()) & (most < bounds[1])
    assert (threshold_margin(sums, most, *bounds) < 1.0).equal(goes)


@pytest.mark.parametrize("depth", [5, 28, 32])
@pytest.mark.parametrize("keep", [0.5, 1 / 3])
def test_keep_is_the_average_over_the_layers(keep: float, depth: int) -> None:
    counts = MustDrop(keep=keep).keep_counts(576, 0, depth)
    assert counts is not None
    assert keep - 1 / 576 * 4 <= sum(counts) / (576 * depth) <= keep


def test_the_thresholds_leave_the_count_open() -> None:
    assert MustDrop(keep=None).keep_counts(576, 0, 32) is None
    assert [event.layer for event in MustDrop().events(32)] == [3, 7, 11, 15]


def test_caches_are_cut_only_where_that_is_asked_for() -> None:
    assert MustDrop().truncations(32) == []
    assert MustDrop(truncate_cache=True).truncations(32) == [(15, 2, 15)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_threshold": 2.0}, "global_threshold=2.0 must lie in"),
        ({"key_share": -0.1}, "key_share=-0.1 must lie in"),
        ({"global_threshold": 0.0}, "must be above 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MustDrop(**options)
