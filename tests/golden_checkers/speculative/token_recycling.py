"""Trees of recycled tokens, what is kept of a round, and the official tree."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mmfast.speculative.drafters.token_recycling import CANDIDATES, filled_tree, ranked_tree, recycle
from mmfast.speculative.tree import RECYCLING_COUNTS, children, counted_tree, depths, static_tree
from support.acceptance import doubles


def check(case: dict[str, Any]) -> None:
    """Compare the draft, the update and the shape."""
    small, update = case["small"], case["update"]
    draft = filled_tree(static_tree(small["template"]), small["adjacency"], small["root"])
    assert [small["root"], *draft.tokens] == small["expected"]["tokens"]
    assert list(draft.tree()) == small["expected"]["parents"]

    kept = [list(row) for row in update.get("adjacency", small["adjacency"])]
    nodes = update.get("node_tokens", small["expected"]["tokens"])
    recycle(kept, nodes, doubles(update["node_logits"]), update["k"])
    assert kept == update["expected_adjacency"]

    expected = case["default_tree"]
    tree = counted_tree(RECYCLING_COUNTS)
    assert [len(below) for below in children(tree.parents)] == expected["child_counts_bfs"]
    levels = Counter(depths(tree.parents))
    assert [levels[depth] for depth in range(1, max(levels) + 1)] == expected["nodes_per_level"]
    assert len(tree.parents) - 1 == expected["n_nodes_without_root"]
    assert max(levels) == expected["max_depth"]
    assert expected["k"] == CANDIDATES

    # The drafter's own order of nodes is another numbering of the same tree.
    ranked = ranked_tree()
    assert _paths(ranked.parents, ranked.ranks) == _paths(tree.parents, tree.ranks)


def _paths(parents: tuple[int, ...], ranks: tuple[int, ...]) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for parent, rank in zip(parents[1:], ranks[1:], strict=True):
        paths.append((*paths[parent], rank))
    return set(paths)
