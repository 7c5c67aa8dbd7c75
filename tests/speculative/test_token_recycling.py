"""Token Recycling: what is kept, what is drafted from it, which part of the tree is best."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast.registry import build
from mmfast.speculative.base import Verified
from mmfast.speculative.drafters.token_recycling import (
    TokenRecycling,
    filled_tree,
    likeliest,
    ranked_tree,
    recycle,
)
from mmfast.speculative.tree import counted_tree, depths
from support.texts import END, IMAGE, VOCABULARY, play, reciting, request, scattered


@given(st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 9))
def test_ties_go_to_the_lower_token(rows: list[list[int]], count: int) -> None:
    expected = [sorted(range(6), key=lambda token, row=row: (-row[token], token))[:count] for row in rows]
    expected = [row + [-1] * (count - len(row)) for row in expected]
    for dtype in (torch.float64, torch.bfloat16):
        assert likeliest(torch.tensor(rows, dtype=dtype), count) == expected


def test_the_later_node_of_a_token_counts() -> None:
    kept: dict[int, Any] = {}
    logits = torch.eye(3)
    recycle(kept, [4, 5, 4], logits, 1)
    assert kept == {4: [2], 5: [1]}


def test_excluded_tokens_neither_follow_nor_are_followed() -> None:
    kept: dict[int, Any] = {}
    recycle(kept, [IMAGE, 4], torch.arange(64.0).expand(2, 64), 2, torch.tensor([IMAGE]), {IMAGE})
    assert kept == {4: [63, 62]}
    recycle(kept, [4], torch.arange(61.0)[None], 2, torch.tensor([IMAGE]), {IMAGE})
    assert kept == {4: [59, 58]}


def test_nothing_is_drafted_of_what_is_not_known() -> None:
    template = counted_tree([3, 2, 2])
    assert filled_tree(template, {}, 5).tokens == ()
    draft = filled_tree(template, {5: [6, -1, 7], 7: [8], 6: [9, -1]}, 5)
    assert (draft.tokens, draft.parents) == ((6, 7, 9), (0, 0, 1))
    assert filled_tree(template, {5: [6, 4]}, 5, most=1).tokens == (6,)


def test_nothing_hangs_from_a_stop_but_the_root() -> None:
    kept = {5: [END, 6], END: [7], 6: [8]}
    assert filled_tree(counted_tree([2, 1, 1]), kept, 5, {END}).tokens == (END, 6, 8)


def test_the_ranked_tree_begins_with_the_best_smaller_trees() -> None:
    ranked = ranked_tree()
    assert len(ranked.parents) == 81
    assert all(parent < node for node, parent in enumerate(ranked.parents))
    assert ranked.take(range(4)).ranks == (-1, 0, 0, 1)
    small = ranked.take(range(25))
    for node, (parent, rank) in enumerate(zip(small.parents, small.ranks, strict=True)):
        if rank > 0:
            assert (parent, rank - 1) in list(zip(small.parents[:node], small.ranks[:node], strict=True))
    assert max(depths(small.parents)) >= 3
    assert sum(depth == 1 for depth in depths(small.parents)) >= 4


def test_the_size_follows_the_device_unless_it_is_given() -> None:
    def size(device: str, **options: Any) -> int:
        memory = {"successors": {token: [*range(2, 10)] for token in range(64)}}
        drafter = TokenRecycling(**options)
        call = request([3], first=[5], memory=memory, device=torch.device("cpu"))
        session = drafter.start(call)
        if device == "cuda":
            session.rows[0].nodes = drafter.most  # type: ignore[attr-defined]
        return len(session.propose({0: 5}, {0: 100})[0].tokens)

    assert (size("cpu"), size("cuda")) == (3, 24)
    assert (size("cpu", nodes=80), size("cpu", nodes=24), size("cpu", nodes=5)) == (80, 24, 5)
    assert (TokenRecycling().most, TokenRecycling(nodes=80).most) == (24, 80)


def test_it_learns_from_every_node_and_remembers_over_calls() -> None:
    memory: dict[str, Any] = {}
    drafter = TokenRecycling(nodes=24)
    session = drafter.start(request([3], first=[5], memory=memory))
    assert session.propose({0: 5}, {0: 24})[0].tokens == ()
    logits = torch.zeros(3, VOCABULARY)
    logits[0, 7], logits[1, 8], logits[2, 9] = 1.0, 1.0, 1.0
    # The second node was not accepted; the third never had a chance.
    session.observe({0: Verified((5, 6, 10), (-1, 0, 1), (0,), (7,), logits)})
    later = drafter.start(request([4], first=[10], memory=memory))
    assert later.propose({0: 10}, {0: 1})[0].tokens == (9,)
    assert later.propose({0: 6}, {0: 1})[0].tokens == (8,)
    fresh = drafter.start(request([4], first=[10], memory={}))
    assert fresh.propose({0: 10}, {0: 1})[0].tokens == ()


def test_an_excluded_root_drafts_nothing() -> None:
    memory = {"successors": {IMAGE: [5], 5: [6]}}
    session = TokenRecycling(nodes=3).start(request([3], first=[5], memory=memory))
    assert session.propose({0: IMAGE}, {0: 3})[0].tokens == ()
    assert session.propose({0: 5}, {0: 3})[0].tokens == (6,)


@pytest.mark.parametrize("nodes", [3, 24, 80])
@pytest.mark.parametrize("rule", [reciting([*range(2, 22)]), reciting([2, 3, 4, 2, 3, 5, 6]), scattered])
def test_the_answer_stays(nodes: int, rule: Any) -> None:
    budget = (80, 0, 7)
    play(TokenRecycling(nodes=nodes), rule, [50, IMAGE, 51, 2], 120, budget=lambda turn: budget[turn % 3])


def test_what_the_model_repeats_is_drafted_to_the_depth_of_the_tree() -> None:
    answer, rounds = play(TokenRecycling(nodes=80), reciting([*range(2, 22)]), [50, 2], 200)
    assert rounds <= 20 + len(answer) // 6


@pytest.mark.parametrize("options", [{"nodes": 0}, {"nodes": 81}, {"nodes": 2.0}, {"nodes": True}])
def test_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="nodes"):
        build("token_recycling", options)
