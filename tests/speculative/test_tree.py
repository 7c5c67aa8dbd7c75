"""Trees of drafted tokens: structure, templates, growth; and rows that accept different numbers of tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.speculative.tree import (
    EAGLE_PATHS,
    RECYCLING_COUNTS,
    Frontier,
    Template,
    ancestors,
    children,
    counted_tree,
    depths,
    grow,
    grow_scored,
    kept_entries,
    leaf_paths,
    leaves,
    path_to,
    positions,
    static_tree,
    visibility,
)


@st.composite
def trees(draw: st.DrawFn, largest: int = 12) -> tuple[int, ...]:
    size = draw(st.integers(1, largest))
    return (-1, *(draw(st.integers(0, node - 1)) for node in range(1, size)))


@given(trees())
@settings(max_examples=60, deadline=None)
def test_every_view_of_a_tree_tells_the_same_paths(parents: tuple[int, ...]) -> None:
    mask, deep = ancestors(parents), depths(parents)
    paths = [path_to(parents, node) for node in range(len(parents))]
    assert [mask[node].nonzero().flatten().tolist() for node in range(len(parents))] == [list(path) for path in paths]
    assert [len(path) - 1 for path in paths] == list(deep)
    assert [[parents[child] for child in below] for below in children(parents)] == [
        [node] * len(below) for node, below in enumerate(children(parents))
    ]
    assert sum(map(len, children(parents))) == len(parents) - 1
    assert leaves(parents) == tuple(node for node, below in enumerate(children(parents)) if not below)
    padded = leaf_paths(parents)
    assert padded.shape[1] == max(deep) + 1
    assert [tuple(row[row >= 0].tolist()) for row in padded] == [paths[leaf] for leaf in leaves(parents)]
    assert positions(parents, 9).tolist() == [9 + depth for depth in deep]
    assert positions(parents, 9, (0, -4)).tolist() == [[9 + depth + delta for depth in deep] for delta in (0, 0, -4)]


@given(trees(), st.lists(st.booleans(), min_size=0, max_size=6), st.data())
@settings(max_examples=40, deadline=None)
def test_a_node_sees_the_prompt_and_what_an_accepted_path_to_it_keeps(
    parents: tuple[int, ...], valid: list[bool], data: st.DataObject
) -> None:
    node = data.draw(st.integers(0, len(parents) - 1))
    seen = visibility(torch.tensor(valid, dtype=torch.bool), parents)
    assert seen.shape == (len(parents), len(valid) + len(parents))
    kept = kept_entries(len(valid), path_to(parents, node))
    assert seen[node].nonzero().flatten().tolist() == [e for e in kept if e >= len(valid) or valid[e]]
    batch = torch.tensor([valid, [not v for v in valid]], dtype=torch.bool)
    assert torch.equal(visibility(batch, parents)[0], seen)


def test_templates_of_the_papers_have_their_sizes() -> None:
    eagle, recycling = static_tree(EAGLE_PATHS), counted_tree(RECYCLING_COUNTS)
    assert _levels(eagle) == [1, 4, 8, 8, 3, 2]
    assert _levels(recycling) == [1, 8, 21, 25, 15, 8, 3]
    assert max(recycling.ranks) == 7


def _levels(template: Template) -> list[int]:
    deep = depths(template.parents)
    return [deep.count(level) for level in range(max(deep) + 1)]


def _paths(template: Template) -> list[tuple[int, ...]]:
    return [
        tuple(template.ranks[step] for step in path_to(template.parents, node)[1:])
        for node in range(1, len(template.parents))
    ]


def test_paths_and_counts_make_the_same_template() -> None:
    template = counted_tree(RECYCLING_COUNTS)
    assert static_tree(reversed_paths := _paths(template)[::-1]) == template
    assert len(set(reversed_paths)) == 80
    assert _paths(static_tree(EAGLE_PATHS)) == list(EAGLE_PATHS)
    assert counted_tree([]) == Template((-1,), (-1,)) == static_tree([])


@pytest.mark.parametrize("paths", [[[0], [0]], [[1, 0]], [[]]])
def test_static_tree_refuses_twins_and_orphans(paths: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="path"):
        static_tree(paths)


def test_counted_tree_refuses_counts_of_nodes_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="counts has 3 entries"):
        counted_tree([1, 0, 2])


def test_a_template_keeps_the_ranks_of_the_nodes_that_stay() -> None:
    template = static_tree([[0], [1], [0, 0], [1, 0], [1, 0, 0]])
    assert template.take((0, 2, 4)) == Template((-1, 0, 1), (-1, 1, 0))


# Growth


class Chart:
    """A drafter that looks at the last tokens, and remembers what it was asked."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        self.table = torch.randn(vocabulary, vocabulary, generator=source, dtype=torch.float64).log_softmax(dim=-1)
        self.asked: list[Frontier] = []

    def __call__(self, frontier: Frontier) -> Tensor:
        self.asked.append(frontier)
        return self.table[frontier.tokens]


def slow_tree(table: Tensor, root: int, total: int, depth: int, top_k: int) -> set[tuple[int, ...]]:
    """Paths of the tokens that stay, by the definition."""

    def best(pairs: dict[tuple[int, ...], float], count: int) -> list[tuple[int, ...]]:
        return sorted(pairs, key=lambda path: -pairs[path])[:count]

    def below(path: tuple[int, ...], score: float) -> dict[tuple[int, ...], float]:
        row = table[path[-1] if path else root].tolist()
        ranked = sorted(range(len(row)), key=lambda token: -row[token])[:top_k]
        return {(*path, token): score + row[token] for token in ranked}

    made = below((), 0.0)
    frontier = list(made)
    for _ in range(depth):
        new: dict[tuple[int, ...], float] = {}
        for path in frontier:
            new |= below(path, made[path])
        made |= new
        frontier = best(new, top_k)
    return set(best(made, total))


@pytest.mark.parametrize(("vocabulary", "total", "depth", "top_k"), [(7, 9, 2, 3), (6, 30, 3, 4), (9, 5, 5, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_grown_trees_hold_the_likeliest_paths(seed: int, vocabulary: int, total: int, depth: int, top_k: int) -> None:
    chart = Chart(vocabulary, seed)
    draft, scores = grow_scored(chart.table[1], chart, total_tokens=total, depth=depth, top_k=top_k)
    parents, tokens = draft.tree(), (1, *draft.tokens)
    paths = [tuple(tokens[step] for step in path_to(parents, node)) for node in range(1, len(tokens))]
    assert {path[1:] for path in paths} == slow_tree(chart.table, 1, total, depth, top_k)
    logs = [sum(float(chart.table[a, b]) for a, b in pairwise(path)) for path in paths]
    assert list(scores) == pytest.approx(logs, abs=1e-12)
    for below in children(parents):
        assert list(below) == sorted(below, key=lambda node: -scores[node - 1])
        assert len({tokens[node] for node in below}) == len(below)
    assert len(chart.asked) == depth


@pytest.mark.parametrize("seed", range(3))
def test_the_mask_of_a_frontier_shows_each_node_its_own_path(seed: int) -> None:
    chart = Chart(8, seed)
    grow(chart.table[0], chart, total_tokens=20, depth=4, top_k=3)
    tokens: list[int] = []
    paths: list[list[int]] = [[]]
    for level, frontier in enumerate(chart.asked):
        assert frontier.level == level
        tokens += frontier.tokens.tolist()
        paths = [
            [*paths[parent], token]
            for parent, token in zip(frontier.parents.tolist(), frontier.tokens.tolist(), strict=True)
        ]
        assert frontier.visible.shape == (len(frontier.tokens), len(tokens))
        shown = [[tokens[place] for place in row.nonzero().flatten().tolist()] for row in frontier.visible]
        assert shown == paths
        assert all(row[-len(paths) + index] for index, row in enumerate(frontier.visible))
        assert int(frontier.visible.sum()) == len(paths) * (level + 1)


def test_equal_likelihoods_go_to_earlier_nodes_and_lower_tokens() -> None:
    flat = torch.full((6, 6), 1 / 6).log()
    draft = grow(flat[0], lambda frontier: flat[frontier.tokens], total_tokens=7, depth=2, top_k=2)
    assert draft.tokens == (0, 1, 0, 1, 0, 1, 0)
    assert draft.parents == (0, 0, 1, 1, 2, 2, 3)
    row = torch.tensor([0.1, 0.3, 0.1, 0.1, 0.3, 0.1]).log()
    assert grow(row, lambda _: row, total_tokens=3, depth=0, top_k=3).tokens == (1, 4, 0)


def test_a_child_that_rounding_lifts_above_its_parent_does_not_lose_it() -> None:
    first, sure = torch.tensor([0.4, 0.6]).log(), torch.tensor([[-torch.inf, 1e-7]])
    draft = grow(first, lambda frontier: sure.expand(len(frontier.tokens), -1), total_tokens=2, depth=2, top_k=2)
    assert (draft.tokens, draft.parents) == ((1, 1), (0, 1))


def test_tokens_that_are_not_to_be_drafted_are_not_and_nothing_follows_a_stop() -> None:
    chart = Chart(5, 0)
    chart.table[:, 2] = -torch.inf
    draft = grow(chart.table[0], chart, total_tokens=100, depth=3, top_k=5, stop=(4,))
    assert 2 not in draft.tokens
    assert 4 in draft.tokens
    assert all(draft.tokens[parent - 1] != 4 for parent in draft.parents if parent > 0)
    nothing = torch.full((5,), -torch.inf)
    assert grow(nothing, chart, total_tokens=5, depth=3, top_k=2).tokens == ()
    only = nothing.index_fill(0, torch.tensor([4]), 0.0)
    assert grow(only, chart, total_tokens=5, depth=3, top_k=2, stop=(4,)).tokens == (4,)


def test_limits_of_a_grown_tree() -> None:
    chart = Chart(5, 1)
    assert grow(chart.table[0], chart, total_tokens=0, depth=1, top_k=2).tokens == ()
    assert len(chart.asked) == 1
    for depth, top_k in ((0, 3), (2, 3), (3, 2), (1, 5)):
        draft = grow(chart.table[0], chart, total_tokens=10**6, depth=depth, top_k=top_k)
        assert len(draft.tokens) == top_k + depth * top_k**2
        assert draft.depth == depth + 1
    assert len(grow(chart.table[0], chart, total_tokens=10**6, depth=0, top_k=50).tokens) == 5
    assert grow(chart.table[0], chart, total_tokens=4, depth=6, top_k=1).chain


# Batches
