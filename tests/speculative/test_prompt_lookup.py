"""Prompt lookup: what is found, what is never copied, what is remembered."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast.registry import build
from mmfast.speculative.drafters.prompt_lookup import Answers, Match, Ngrams, PromptLookup, fitting
from support.texts import END, IMAGE, play, reciting, request, scattered, silent

TOKENS = st.lists(st.integers(0, 4), max_size=40)


def brute(ids: list[int], longest: int, count: int, policy: str, excluded: int) -> Match:
    """Scan the whole text, as the definition says."""
    for length in range(longest, 0, -1):
        pattern = ids[len(ids) - length :] if len(ids) >= length else []
        if not pattern or excluded in pattern:
            continue
        places = [
            start
            for start in range(len(ids) - length)
            if ids[start : start + length] == pattern and ids[start + length] != excluded
        ]
        if places:
            start = places[0 if policy == "first" else -1]
            draft = ids[start + length : start + length + count]
            draft = draft[: draft.index(excluded)] if excluded in draft else draft
            return Match(start, length, tuple(draft))
    return Match()


@given(TOKENS, st.integers(1, 5), st.integers(1, 6), st.sampled_from(["first", "last"]))
def test_the_index_finds_what_a_scan_finds(ids: list[int], longest: int, count: int, policy: Any) -> None:
    text = Ngrams(longest, 1, {4}, policy)
    for place, token in enumerate(ids):
        text.add(token)
        assert text.find(text.tail, count) == brute(ids[: place + 1], longest, count, policy, 4)


def draft_of(drafter: PromptLookup, *prompt: int, budget: int = 10, device: str = "cuda", **changes: Any) -> Any:
    """Draft once: the last token of ``prompt`` is the root."""
    call = request(prompt[:-1], first=[prompt[-1]], device=torch.device(device), **changes)
    return drafter.start(call).propose({0: prompt[-1]}, {0: budget})[0]


def test_the_draft_grows_with_the_match() -> None:
    text = list(range(2, 30))
    drafter = PromptLookup()
    for ngram, expected in ((1, 2), (2, 6), (3, 8), (4, 10), (6, 10)):
        end = text[8 - ngram : 8]
        assert draft_of(drafter, *text, 40, *end).tokens == tuple(text[8 : 8 + expected])


def test_on_a_cpu_only_long_matches_are_worth_more_than_two_tokens() -> None:
    text = list(range(2, 30))
    for ngram, expected in ((1, 2), (3, 2), (4, 10)):
        end = text[8 - ngram : 8]
        assert len(draft_of(PromptLookup(), *text, 40, *end, device="cpu").tokens) == expected
    assert [fitting(ngram, 1, True) for ngram in (1, 2, 4)] == [1, 1, 1]


def test_a_budget_is_kept_and_more_than_num_draft_is_never_drafted() -> None:
    text = list(range(2, 30))
    assert len(draft_of(PromptLookup(), *text, 40, *text[2:8], budget=3).tokens) == 3
    assert len(draft_of(PromptLookup(num_draft=4), *text, 40, *text[2:8], budget=50).tokens) == 4


def test_the_draft_ends_with_a_stop_and_none_follows_one() -> None:
    drafter = PromptLookup(min_ngram=2)
    assert draft_of(drafter, 5, 6, 7, END, 8, 9, 5, 6).tokens == (7, END)
    assert draft_of(drafter, 6, END, 8, 9, 6, END).tokens == ()


def test_nothing_is_matched_or_copied_across_an_image() -> None:
    assert draft_of(PromptLookup(), 5, 6, IMAGE, IMAGE, 7, 8, 5, 6).tokens == ()
    assert draft_of(PromptLookup(), 5, 6, 7, IMAGE, 8, 9, 5, 6).tokens == (7,)
    assert draft_of(PromptLookup(), 9, IMAGE, 7, 8, IMAGE).tokens == ()
    # The newest place leads to an image, the one before it does not.
    assert draft_of(PromptLookup(), 5, 6, 7, 8, 5, 6, IMAGE, 5, 6).tokens[:2] == (7, 8)


def test_a_token_the_model_has_no_logits_for_is_not_drafted() -> None:
    assert draft_of(PromptLookup(), 5, 6, 7, 99, 8, 5, 6).tokens == (7,)


def test_policy() -> None:
    text = (5, 6, 7, 40, 5, 6, 8, 41, 5, 6)
    assert draft_of(PromptLookup(policy="last"), *text).tokens[0] == 8
    assert draft_of(PromptLookup(policy="first"), *text).tokens[0] == 7


def test_answers_of_earlier_calls_are_searched_after_the_text() -> None:
    memory: dict[str, Any] = {}
    drafter = PromptLookup()
    rule = reciting([2, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, END])
    _, alone = play(drafter, rule, [30, 2], 12, memory)
    _, again = play(drafter, rule, [31, 2], 12, memory)
    assert alone == 11
    assert again <= 5
    _, without = play(PromptLookup(remember=0), rule, [31, 2], 12, {})
    assert without == 11
    # The same number of tokens agree: the text of this call counts.
    assert draft_of(drafter, 10, 50, 33, 34, 35, 10, memory=memory).tokens == (50, 33)
    # More tokens agree in an earlier answer.
    assert draft_of(drafter, 11, 50, 33, 34, 10, 11, memory=memory).tokens[:2] == (12, 13)


def test_answers_are_not_joined_and_not_kept_without_end() -> None:
    kept = Answers(10)
    assert not kept.add([1, 2, 3, 4])
    assert not kept.add([5, 6, 7, 8])
    assert kept.add([9, 9, 9])
    assert list(kept) == [(9, 9, 9)]
    assert not Answers(0).add([1, 2])
    memory: dict[str, Any] = {}
    for last in (20, 21):
        session = PromptLookup().start(request([2], first=[last], memory=memory))
        session.close()
    assert draft_of(PromptLookup(), 40, 41, 20, memory=memory).tokens == ()
    small = PromptLookup(remember=40)
    memory = {}
    for turn in range(20):
        session = small.start(request([2], first=[turn], memory=memory))
        session.observe({0: silent(turn, [30 + turn])})
        session.observe({0: silent(30 + turn, list(range(2, 9)))})
        session.close()
    assert len(memory["ngrams"].tokens) <= 60
    assert draft_of(small, 40, 41, 19, 49, memory=memory).tokens[:2] == (2, 3)
    assert draft_of(small, 40, 41, 3, 33, memory=memory).tokens == ()


def test_rows_of_a_batch_have_texts_of_their_own() -> None:
    call = request([5, 6, 7, 40, 5], [5, 6, 8, 40, 5], first=[6, 6])
    session = PromptLookup().start(call)
    drafts = session.propose({0: 6, 1: 6}, {0: 1, 1: 1})
    assert (drafts[0].tokens, drafts[1].tokens) == ((7,), (8,))
    session.observe({1: silent(6, [9])})
    assert session.propose({1: 9}, {1: 1})[1].tokens == ()


@pytest.mark.parametrize("rule", [reciting([*range(2, 22)]), scattered])
def test_the_answer_stays_and_copying_saves_rounds(rule: Any) -> None:
    answer, rounds = play(PromptLookup(), rule, [50, 51, 2], 120, budget=lambda turn: (0, 3, 10)[turn % 3])
    assert len(answer) >= 120
    assert rounds < 60 if rule is not scattered else rounds > 90


def test_a_round_takes_no_longer_after_a_long_prompt() -> None:
    def seconds(length: int) -> float:
        prompt = [2 + (place * place * 31 + place // 7) % 50 for place in range(length)]
        session = PromptLookup().start(request(prompt, first=[3]))
        best = 1.0
        for _ in range(7):
            begin = time.perf_counter()
            for _ in range(100):
                session.propose({0: 3}, {0: 10})
                session.observe({0: silent(3, [5, 3])})
            best = min(best, time.perf_counter() - begin)
        return best

    assert seconds(40_000) < 10 * seconds(400)


@pytest.mark.parametrize(
    "options",
    [
        {"num_draft": 0},
        {"num_draft": True},
        {"min_ngram": 0},
        {"max_ngram": 2, "min_ngram": 3},
        {"policy": "newest"},
        {"remember": -1},
        {"max_ngram": 2.0},
    ],
)
def test_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build("prompt_lookup", options)
