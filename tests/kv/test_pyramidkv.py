"""PyramidKV: budgets that add up, and scorers in text form."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast.kv.entries import Entries
from mmfast.plan import Plan
from mmfast.registry import get

PYRAMID = get("pyramidkv").method


@given(st.integers(2, 700), st.floats(0.01, 1.0), st.integers(1, 40), st.integers(1, 40), st.integers(1, 30))
def test_budgets_fall_and_average_to_keep(entries: int, keep: float, depth: int, window: int, beta: int) -> None:
    method = PYRAMID(keep=keep, scorer=f"snapkv(window={window})", beta=beta)
    counts = [method.layer_count(entries, layer, depth) for layer in range(depth)]
    assert sum(counts) == depth * method.keep_count(entries)
    assert all(1 <= count <= entries for count in counts)
    # Where two layers share a remainder the earlier one has it.
    assert all(first >= second for first, second in pairwise(counts))


def test_budgets_by_hand() -> None:
    # 6 beside the window of 2: first 12, last 0, and 3 layers between them.
    exact = PYRAMID(keep=8, scorer="snapkv(window=2)")
    assert [exact.layer_count(40, layer, 5) for layer in range(5)] == [14, 11, 8, 5, 2]
    # Without a window everything is in the pyramid, but one entry is left in each layer.
    keys_only = PYRAMID(keep=5, scorer="knorm")
    assert [keys_only.layer_count(40, layer, 3) for layer in range(3)] == [9, 5, 1]
    # 7 beside the window: first 13, last 1; the step of 12 / 5 is cut off to 2.
    official = PYRAMID(keep=9, scorer="snapkv(window=2)", beta=7, budgets="official")
    assert [official.layer_count(40, layer, 6) for layer in range(6)] == [15, 13, 11, 9, 7, 5]


def prompt(layer: int, depth: int, length: int = 40) -> Entries:
    generator = torch.Generator().manual_seed(layer)
    states = [torch.randn(2, length, 4, generator=generator) for _ in range(3)]
    return Entries.of(*states, layer=layer, depth=depth)


def test_a_layer_that_keeps_the_window_alone_keeps_all_of_it() -> None:
    method = PYRAMID(keep=8, scorer="snapkv(window=2)")
    retained = method(prompt(4, 5))
    assert retained.counts == [2, 2]
    assert retained.kept[:, -2:].all()


def test_each_layer_takes_the_highest_scores_of_the_scorer() -> None:
    method, plain = PYRAMID(keep=8, scorer="snapkv(window=2, kernel=1)"), get("snapkv").method
    for layer, count in enumerate([14, 11, 8, 5]):
        entries = prompt(layer, 5)
        expected = plain(keep=count, window=2, kernel=1)(entries)
        assert torch.equal(method(entries).kept, expected.kept)


def test_visual_entries_alone_can_compete() -> None:
    method = PYRAMID(keep=4, scorer="snapkv(window=2)", entries="visual")
    assert [method.layer_count(30, layer, 3) for layer in range(3)] == [7, 4, 1]
    entries = prompt(0, 3)
    visual = torch.zeros(40, dtype=torch.bool)
    visual[5:35] = True
    shown = Entries.of(entries.keys, entries.values, entries.view.query, visual, layer=0, depth=3)
    kept = method(shown).kept
    assert kept[:, ~visual].all()
    assert set(kept[:, visual].sum(dim=-1).tolist()) == {method.layer_count(30, 0, 3)}


def test_signals_are_those_of_the_scorer() -> None:
    assert PYRAMID().needs == {"attention"}
    assert PYRAMID().reads_question
    keys_only = PYRAMID(scorer="knorm")
    assert keys_only.needs == frozenset()
    assert not keys_only.reads_question


def test_a_plan_holds_the_scorer_as_text() -> None:
    text = "pyramidkv(keep=64, scorer='snapkv(window=16)')"
    plan = Plan.parse(text)
    assert plan.to_text() == text
    assert plan.methods[0].inner.window == 16
    assert plan.methods[0].inner.keep == 64


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("snapkv(keep=3)", "sets keep"),
        ("snapkv(entries='visual')", "sets entries"),
        ("snapkv(windw=3)", "no option 'windw'"),
        ("snapkv(window=0)", "window=0"),
        (3, "must name one method"),
        ("h2o", "must name one method"),
        ("divprune", "must name one method"),
        ("adakv", "must name another method"),
        ("pyramidkv", "must name another method"),
        ("snapkw", "unknown method"),
    ],
)
def test_what_is_no_scorer_is_refused(scorer: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PYRAMID(scorer=scorer)


@pytest.mark.parametrize("options", [{"beta": 0}, {"beta": 1.5}, {"budgets": "linear"}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PYRAMID(**options)
