"""Suffix decoding: counts as brute force has them, scores, trees, earlier answers."""

from __future__ import annotations

import time
from math import floor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfast.registry import build
from mmfast.speculative.drafters.suffix import Node, Suffix, SuffixTree
from support.texts import END, IMAGE, VOCABULARY, play, reciting, request, scattered, silent

TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=14), max_size=4)


def count(texts: list[list[int]], string: list[int]) -> int:
    """Count in how many places a string stands."""
    length = len(string)
    return sum(text[place : place + length] == string for text in texts for place in range(len(text) - length + 1))


def counts(tree: SuffixTree) -> dict[tuple[int, ...], int]:
    """Write out all strings of a tree."""
    found: dict[tuple[int, ...], int] = {}

    def walk(node: Node | int, path: tuple[int, ...]) -> None:
        if path:
            found[path] = node.count if isinstance(node, Node) else 1
        if len(path) < tree.depth:
            for token, child in tree._children(node):
                walk(child, (*path, token))

    walk(tree.root, ())
    return found


@given(TEXTS, st.integers(2, 6))
def test_every_string_is_counted(texts: list[list[int]], depth: int) -> None:
    tree = SuffixTree(depth)
    for text in texts:
        tree.extend([*text, -1])
    expected = {
        tuple(text[start:end])
        for text in texts
        for start in range(len(text))
        for end in range(start + 1, min(len(text), start + depth) + 1)
    }
    assert counts(tree) == {string: count(texts, list(string)) for string in expected}


def brute(
    texts: list[list[int]], context: list[int], depth: int, most: int, factor: float, least: float
) -> tuple[list[int], float, int]:
    """Speculate by counting in the texts alone."""
    best: tuple[list[int], float, int] = ([], 0.0, 0)
    for match in range(1, min(len(context), depth) + 1):
        string = context[len(context) - match :]
        if not count(texts, string):
            break
        tokens: list[int] = []
        prob, score = 1.0, 0.0
        while len(tokens) < min(most, floor(match * factor + 1e-6)) and match + len(tokens) < depth:
            here = [*string, *tokens]
            share, token = max((count(texts, [*here, token]), -token) for token in range(4))
            prob *= share / count(texts, here)
            if not share or prob < least:
                break
            tokens.append(-token)
            score += prob
        if tokens and score >= best[1] - 1e-12:
            best = (tokens, score, match)
    return best


@given(TEXTS, st.lists(st.integers(0, 3), max_size=8), st.integers(2, 8), st.integers(1, 5), st.sampled_from([1, 2, 3]))
def test_the_draft_is_that_of_brute_force(
    texts: list[list[int]], context: list[int], depth: int, most: int, factor: int
) -> None:
    tree = SuffixTree(depth)
    for text in texts:
        tree.extend([*text, -1])
    found = tree.speculate(tree.match(context), most, float(factor))
    tokens, score, match = brute(texts, context, depth, most, factor, 0.1)
    assert (list(found.tokens), found.match) == (tokens, match)
    assert found.score == pytest.approx(score, abs=1e-12)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(2, 8))
def test_the_end_of_a_growing_text_is_found_without_looking_for_it(text: list[int], depth: int) -> None:
    tree = SuffixTree(depth)
    for place, token in enumerate(text):
        tree.add(token)
        found = tree.match(text[: place + 1])
        # Strings that stand there once have nothing behind them and are not kept.
        assert tree.ends == [node for node in found if isinstance(node, Node)]
        assert tree.speculate(tree.ends, 4) == tree.speculate(found, 4)


def test_ties_go_to_the_lower_token_and_the_longer_string() -> None:
    tree = SuffixTree()
    tree.extend([1, 2, 9, -1, 1, 2, 8, -1])
    found = tree.speculate(tree.match([1, 2]), 4)
    assert (found.tokens, found.match) == ((8,), 2)


def test_a_tree_has_the_likeliest_continuations_first() -> None:
    tree = SuffixTree()
    for follows in ([3, 4], [3, 4], [3, 5], [6, 7], [6, 7], [8]):
        tree.extend([1, 2, *follows, -1])
    found = tree.speculate(tree.match([1, 2]), 10, 3.0, tree=True)
    assert found.tokens == (3, 6, 4, 7, 8, 5)
    assert found.parents == (0, 0, 1, 2, 0, 1)
    assert found.probs == pytest.approx((3 / 6, 2 / 6, 2 / 6, 2 / 6, 1 / 6, 1 / 6))
    assert len(tree.speculate(tree.match([1, 2]), 10, 1.0, tree=True).tokens) == 2


def draft_of(drafter: Suffix, *prompt: int, budget: int = 16, **changes: Any) -> Any:
    """Draft once: the last token of ``prompt`` is the root."""
    session = drafter.start(request(prompt[:-1], first=[prompt[-1]], **changes))
    return session.propose({0: prompt[-1]}, {0: budget})[0]


def test_images_stops_and_tokens_without_logits() -> None:
    drafter = Suffix(factor=4.0)
    assert draft_of(drafter, 5, 6, 7, IMAGE, 8, 5, 6).tokens == (7,)
    assert draft_of(drafter, 5, IMAGE, 6, 7, 5, 6).tokens[:1] == (7,)
    assert draft_of(drafter, 5, IMAGE, 7, 8, 5).tokens == ()
    assert draft_of(drafter, 5, 6, 7, END, 8, 5, 6).tokens == (7, END)
    assert draft_of(drafter, 5, END, 8, END).tokens == ()
    assert draft_of(drafter, 5, 6, 7, VOCABULARY, 8, 5, 6).tokens == (7,)
    assert draft_of(drafter, 5, 6, 7, 8, 9, 5, 6, budget=2).tokens == (7, 8)
    branching = draft_of(Suffix(tree=True, factor=4.0), 5, 6, END, 8, 5, 6, 7, 9, 5, 6)
    assert set(zip(branching.parents, branching.tokens, strict=True)) >= {(0, END), (0, 7)}
    assert END not in [branching.tokens[parent - 1] for parent in branching.parents if parent]


def test_a_score_below_the_least_drafts_nothing() -> None:
    text = (5, 6, 7, 5, 6)
    assert draft_of(Suffix(), *text).tokens
    assert not draft_of(Suffix(min_score=3.0), *text).tokens


def test_answers_of_earlier_calls_count() -> None:
    memory: dict[str, Any] = {}
    rule = reciting([2, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, END])
    _, alone = play(Suffix(), rule, [30, 2], 15, memory)
    _, again = play(Suffix(), rule, [31, 2], 15, memory)
    assert again < alone - 5
    # Two answers are not one text.
    memory = {}
    for last in (20, 21):
        Suffix().start(request([2], first=[last], memory=memory)).close()
    assert draft_of(Suffix(), 40, 20, memory=memory).tokens == ()
    # The oldest go.
    memory, small = {}, Suffix(remember=20)
    for turn in range(10):
        session = small.start(request([2], first=[turn + 2], memory=memory))
        session.observe({0: silent(turn + 2, [30 + turn, 50, 51])})
        session.close()
    assert len(memory["tree"].tokens) <= 30
    assert draft_of(small, 2, 11, 39, memory=memory).tokens == (50, 51)
    assert draft_of(small, 2, 2, 30, memory=memory).tokens == ()


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("rule", [reciting([*range(2, 22)]), reciting([2, 3, 4, 2, 3, 5, 6]), scattered])
def test_the_answer_stays(tree: bool, rule: Any) -> None:
    budget = (16, 0, 5)
    play(Suffix(tree=tree), rule, [50, IMAGE, IMAGE, 51, 2], 150, budget=lambda turn: budget[turn % 3])


def test_copying_saves_rounds() -> None:
    _, rounds = play(Suffix(), reciting([*range(2, 22)]), [50, 2], 200)
    assert rounds < 50


def test_only_trees_need_a_mask() -> None:
    assert (Suffix().trees, Suffix(tree=True).trees) == (False, True)
    assert draft_of(Suffix(), 5, 6, 7, 5, 6).chain


def test_one_token_over_and_over_does_not_slow_it_down() -> None:
    begin = time.perf_counter()
    session = Suffix(tree=True).start(request([5] * 4000, first=[5]))
    for _ in range(20):
        session.propose({0: 5}, {0: 16})
        session.observe({0: silent(5, [5])})
    assert time.perf_counter() - begin < 5.0


@pytest.mark.parametrize(
    "options",
    [{"num_draft": 0}, {"factor": -1.0}, {"min_prob": 1.5}, {"max_depth": 1}, {"tree": 1}, {"min_score": "1"}],
)
def test_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build("suffix", options)
