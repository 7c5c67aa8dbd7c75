"""Lookahead: the tree stands for the official mask, the pool fills, the answer stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmfast.registry import build
from mmfast.speculative.drafters.lookahead import Lookahead, Pool, Trie, Window, places_within, window_size
from mmfast.speculative.tree import ancestors, depths
from support.texts import END, IMAGE, VOCABULARY, play, reciting, request, scattered, verify


def official(window: int, ngram: int) -> tuple[torch.Tensor, list[int]]:
    """Build mask and positions of the lookahead branch: root and first generation, then the later generations."""
    first = window  # the root stands for place 0
    size = first + (ngram - 2) * window
    mask, positions = torch.zeros(size, size, dtype=torch.bool), []
    for place in range(first):
        mask[place, : place + 1] = True
        positions.append(place)
    for generation in range(ngram - 2):
        for place in range(window):
            row = first + generation * window + place
            mask[row, : place + 1] = True
            for earlier in range(generation + 1):
                mask[row, first + earlier * window + place] = True
            positions.append(place + 1 + generation)
    return mask, positions


@pytest.mark.parametrize(("size", "ngram"), [(7, 5), (3, 4), (1, 3), (5, 3)])
def test_the_tree_is_the_official_mask(size: int, ngram: int) -> None:
    # Tokens that all differ, so that no two nodes are one.
    window = Window(ngram, range(100, 200))
    window.first = list(range(1, size))
    window.later = [[10 * generation + place + 20 for place in range(size)] for generation in range(ngram - 2)]
    trie = Trie()
    ends = [trie.add(path, 1000) for path in window.paths(size)]
    assert len(trie.tokens) == window_size(ngram, size)
    order = [-1, *window.first, *(token for row in window.later for token in row)]
    nodes = [0, *(trie.tokens.index(token) + 1 for token in order[1:])]
    parents = (-1, *trie.parents)
    mask, positions = official(size, ngram)
    assert torch.equal(ancestors(parents)[nodes][:, nodes], mask)
    assert [depths(parents)[node] for node in nodes] == positions
    assert [([-1, *trie.tokens])[end] for end in ends] == window.later[-1]


def test_the_window_shifts_as_the_official_one() -> None:
    window, pool = Window(4, [7]), Pool(7)
    window.first, window.later = [11, 12], [[20, 21, 22], [30, 31, 32]]
    window.shift(10, [40, 41, 42], pool)
    assert (window.first, window.later) == ([21, 22], [[30, 31, 32], [40, 41, 42]])
    assert pool.after(10) == [(20, 30, 40)]
    assert pool.after(11) == [(21, 31, 41)]
    assert pool.after(12) == [(22, 32, 42)]


def test_generations_are_gathered_before_ngrams_are_kept() -> None:
    window, pool = Window(4, [7, 8, 9]), Pool(7)
    assert [len(path) for path in window.paths(2)] == [1, 2]
    window.shift(10, [40, 41], pool)
    assert [path[-2:] for path in window.paths(2)] == [(window.later[0][0], 40), (window.later[0][1], 41)]
    assert not pool.after(10)
    window.shift(12, [50, 51], pool)
    assert len(pool.after(12)) == 1
    assert pool.after(12)[0][1:] == (40, 50)


def test_the_window_narrows_and_widens() -> None:
    window = Window(4, [7, 8, 9])
    window.paths(3)
    window.shift(10, [40, 41, 42], Pool(1))
    assert [path[-1] for path in window.paths(2)] == [40, 41]
    wide = window.paths(4)
    assert [path[-1] for path in wide[:2]] == [40, 41]
    assert [len(path) for path in wide] == [2, 3, 4, 5]
    assert window.paths(0) == []
    assert len(window.paths(4)) == 4


def test_paths_that_begin_alike_are_one() -> None:
    trie = Trie()
    assert [trie.add(path, 10) for path in [(1, 2, 3), (1, 2), (1, 4), (5,)]] == [3, 2, 4, 5]
    assert (trie.tokens, trie.parents) == ([1, 2, 3, 4, 5], [0, 1, 2, 1, 0])
    assert trie.add((6, 7), 5) == 0


def test_sizes() -> None:
    assert Lookahead().most == 27 + 28
    for room in range(60):
        places = places_within(5, 7, room)
        assert window_size(5, places) <= room
        assert places == 7 or window_size(5, places + 1) > room


def test_the_window_and_the_pool_fit_the_budget() -> None:
    prompt = [place % 3 + 5 for place in range(40)] + [IMAGE, 9]
    for budget in range(1, 60):
        session = Lookahead().start(request(prompt, first=[5]))
        draft = session.propose({0: 5}, {0: budget})[0]
        assert len(draft.tokens) <= budget
        assert draft.tokens[0] == 6
        assert IMAGE not in draft.tokens


def test_the_pool_begins_with_the_prompt_but_not_across_images() -> None:
    prompt = [5, 6, 7, 8, IMAGE, 9, 10, 11]
    draft = Lookahead(ngram=4, window=1).start(request(prompt, first=[5])).propose({0: 5}, {0: 3})[0]
    assert draft.tokens == (6, 7, 8)
    without = Lookahead(ngram=4, window=1, pool_from_prompt=False).start(request(prompt, first=[5]))
    assert without.propose({0: 5}, {0: 3})[0].tokens != (6, 7, 8)
    ended = Lookahead(ngram=4, window=1).start(request([5, 6, END, 8], first=[5])).propose({0: 5}, {0: 3})[0]
    assert ended.tokens[:2] == (6, END)
    assert 2 not in ended.parents


def test_barred_tokens_are_never_guessed() -> None:
    def rule(tokens: Any) -> int:
        return IMAGE if len(tokens) % 2 else END

    session = Lookahead(pool_from_prompt=False).start(request([5, 6, 7], first=[5]))
    root, before = 5, [5, 6, 7]
    for _ in range(8):
        draft = session.propose({0: root}, {0: 55})[0]
        assert not {IMAGE, END} & set(draft.tokens)
        seen = verify(rule, before, root, draft)
        session.observe({0: seen})
        before, root = [*before, root], 8


def test_a_prompt_without_text_is_no_trouble() -> None:
    session = Lookahead().start(request([IMAGE, IMAGE], first=[IMAGE]))
    assert session.propose({0: IMAGE}, {0: 55})[0].tokens == ()
    session = Lookahead().start(request([IMAGE], first=[5]))
    assert max(session.propose({0: 5}, {0: 55})[0].tokens) < VOCABULARY


@pytest.mark.parametrize("options", [{}, {"ngram": 3, "window": 2, "guesses": 1}, {"window": 1}])
@pytest.mark.parametrize("rule", [reciting([*range(2, 22)]), reciting([2, 3, 4, 2, 3, 5, 6]), scattered])
def test_the_answer_stays(options: dict[str, Any], rule: Any) -> None:
    budget = (55, 0, 5, 55, 20)
    play(Lookahead(**options), rule, [50, IMAGE, 51, 2], 120, budget=lambda turn: budget[turn % 5])


def test_guesses_the_model_corrects_save_rounds_where_nothing_was_said_before() -> None:
    # Each token follows from the one before, so the correction of a guess is the truth from there on.
    chain = [2 + place * 7 % 53 for place in range(53)]
    after = {token: chain[(place + 1) % 53] for place, token in enumerate(chain)}

    def rule(tokens: Any) -> int:
        return after.get(tokens[-1], chain[0])

    drafter = Lookahead(pool_from_prompt=False)
    answer, rounds = play(drafter, rule, [*chain[::5], chain[0]], 50)
    assert len(set(answer)) == len(answer)
    assert rounds < 35


@pytest.mark.parametrize("options", [{"ngram": 2}, {"window": 0}, {"guesses": 0}, {"pool_from_prompt": 1}])
def test_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build("lookahead", options)
