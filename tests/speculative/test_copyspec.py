"""CopySpec: the first place of the last few tokens, and no other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfast.registry import build
from mmfast.speculative.drafters.copyspec import CopySpec
from support.texts import END, IMAGE, play, reciting, request, silent


def draft_of(drafter: CopySpec, *prompt: int, budget: int = 10) -> tuple[int, ...]:
    """Draft once: the last token of ``prompt`` is the root."""
    session = drafter.start(request(prompt[:-1], first=[prompt[-1]]))
    return session.propose({0: prompt[-1]}, {0: budget})[0].tokens


def test_the_first_place_counts() -> None:
    assert draft_of(CopySpec(), 2, 3, 4, 7, 2, 3, 4, 8, 2, 3, 4)[:1] == (7,)


@given(st.lists(st.integers(2, 4), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 6))
def test_the_draft_is_that_of_a_scan(ids: list[int], gamma: int, count: int) -> None:
    expected: tuple[int, ...] = ()
    for start in range(len(ids) - gamma):
        if ids[start : start + gamma] == ids[len(ids) - gamma :]:
            expected = tuple(ids[start + gamma : start + gamma + count])
            break
    assert draft_of(CopySpec(gamma=gamma, num_draft=count), *ids) == expected


def test_all_gamma_tokens_have_to_agree_also_where_room_is_short() -> None:
    assert draft_of(CopySpec(), 9, 3, 4, 7, 8, 3, 4) == ()
    assert draft_of(CopySpec(), 2, 3, 4, 7, 8, 2, 3, 4, budget=1) == (7,)


def test_tokens_with_the_same_hash_are_told_apart() -> None:
    # CPython gives -1 and -2 one hash; so do these two runs as numbers in a base of 2**61 - 1.
    base = 2**61 - 1
    assert hash((5, base + 6)) == hash((5, 6))
    session = CopySpec(gamma=2).start(request([5, base + 6, 7, 8, 5], first=[6]))
    assert session.propose({0: 6}, {0: 4})[0].tokens == ()


def test_images_and_stops() -> None:
    assert draft_of(CopySpec(), 2, 3, 4, 7, IMAGE, 8, 2, 3, 4) == (7,)
    assert draft_of(CopySpec(), 2, 3, IMAGE, 4, 7, 2, 3, 4) == ()
    assert draft_of(CopySpec(), 2, 3, 4, END, 8, 2, 3, 4) == (END,)
    assert draft_of(CopySpec(gamma=1), END, 4, 5, END) == ()
    assert draft_of(CopySpec(), 2, 3, 4, 7, 99, 2, 3, 4) == (7,)


def test_what_is_given_out_is_copied_too() -> None:
    session = CopySpec().start(request([9], first=[2]))
    session.observe({0: silent(2, [3, 4, 5, 6])})
    session.observe({0: silent(6, [2, 3, 4])})
    assert session.propose({0: 4}, {0: 2})[0].tokens == (5, 6)


def test_the_answer_stays_and_copying_saves_rounds() -> None:
    _, rounds = play(CopySpec(), reciting([*range(2, 22)]), [50, 51, 2], 200)
    assert rounds < 60


@pytest.mark.parametrize("options", [{"gamma": 0}, {"num_draft": 0}, {"gamma": "3"}])
def test_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build("copyspec", options)
