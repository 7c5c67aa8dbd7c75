"""Trees of drafted tokens: who sees whom, where each stands, which shape is worth its size.

Nodes are numbered in an order in which a parent comes before its children. Node 0 is the root, the last token
of the answer so far; its parent is -1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.speculative.base import Draft

RECYCLING_COUNTS = (
    # One line per level; the last nodes have no children.
    *(8,),
    *(8, 4, 3, 2, 1, 1, 1, 1),
    *(8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    *(5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0),
    *(3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0),
    *(2, 0, 0, 1, 0, 0, 0, 0),
    *(0, 0, 0),
)
"""Children of each node of the 80-token tree of Token Recycling (arXiv 2408.08696), breadth first."""

EAGLE_PATHS: tuple[tuple[int, ...], ...] = (
    *((0,), (1,), (2,), (3,)),
    *((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)),
    *((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0)),
    *((0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2)),
    *((0, 0, 0, 0, 0), (0, 0, 0, 0, 1)),
)
"""The 25-token tree of EAGLE (arXiv 2401.15077): per node the ranks of the candidates that lead to it."""


def depths(parents: Sequence[int]) -> tuple[int, ...]:
    """Count the steps from the root to every node.

    Args:
        parents: parent of each node, -1 for the root.

    Returns:
        Depth of each node, 0 for the root.

    Example:
        >>> depths((-1, 0, 0, 1))
        (0, 1, 1, 2)
    """
    found: list[int] = []
    for parent in parents:
        found.append(found[parent] + 1 if parent >= 0 else 0)
    return tuple(found)


def children(parents: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """List the children of every node, in their order.

    Example:
        >>> children((-1, 0, 0, 1))
        ((1, 2), (3,), (), ())
    """
    found: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            found[parent].append(node)
    return tuple(map(tuple, found))


def leaves(parents: Sequence[int]) -> tuple[int, ...]:
    """List the nodes without children; the root where it is alone.

    Example:
        >>> leaves((-1, 0, 0, 1))
        (2, 3)
    """
    inner = set(parents)
    return tuple(node for node in range(len(parents)) if node not in inner)


def leaf_paths(parents: Sequence[int]) -> Tensor:
    """Return the path from the root to every leaf, int64 ``[leaves, depth + 1]``, -1 beyond a leaf.

    Example:
        >>> leaf_paths((-1, 0, 0, 1)).tolist()
        [[0, 2, -1], [0, 1, 3]]
    """
    found = leaves(parents)
    paths = torch.full((len(found), max(depths(parents)) + 1), -1)
    for row, leaf in enumerate(found):
        path = path_to(parents, leaf)
        paths[row, : len(path)] = torch.tensor(path)
    return paths


def path_to(parents: Sequence[int], node: int) -> tuple[int, ...]:
    """Return the nodes from the root to a node, both included.

    Example:
        >>> path_to((-1, 0, 0, 1), 3)
        (0, 1, 3)
    """
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return tuple(reversed(path))


def ancestors(parents: Sequence[int]) -> Tensor:
    """Return who sees whom, bool ``[N, N]``: every node its ancestors and itself.

    Example:
        >>> ancestors((-1, 0, 0, 1)).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    """
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def visibility(valid: Tensor, parents: Sequence[int]) -> Tensor:
    """Return what each node sees of the cache and of the tree.

    Args:
        valid: bool ``[..., P]``, which cached entries are tokens and not padding or holes.
        parents: parent of each of N nodes, -1 for the root.

    Returns:
        bool ``[..., N, P + N]`` on the device of ``valid``.

    Example:
        >>> visibility(torch.tensor([False, True]), (-1, 0, 0)).int().tolist()
        [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 0, 1]]
    """
    nodes = len(parents)
    before = valid.bool()[..., None, :].expand(*valid.shape[:-1], nodes, valid.shape[-1])
    inside = ancestors(parents).to(valid.device).expand(*valid.shape[:-1], nodes, nodes)
    return torch.cat([before, inside], dim=-1)


def positions(parents: Sequence[int], start: int, deltas: Sequence[int] = ()) -> Tensor:
    """Return position ids: a node stands as far behind the root as it is deep.

    Args:
        parents: parent of each of N nodes, -1 for the root.
        start: position of the root, the number of valid tokens before it.
        deltas: what further rows add to the position, one entry each; three equal ones for models that count
            time, height and width.

    Returns:
        int64 ``[N]``, or ``[1 + len(deltas), N]`` with deltas.

    Example:
        >>> positions((-1, 0, 0, 1), 7).tolist()
        [7, 8, 8, 9]
        >>> positions((-1, 0, 0, 1), 7, (-3, -3, -3))[1].tolist()
        [4, 5, 5, 6]
    """
    row = torch.tensor(depths(parents)) + start
    return torch.stack([row, *(row + delta for delta in deltas)]) if deltas else row


def kept_entries(cached: int, path: Sequence[int]) -> tuple[int, ...]:
    """List the cache entries that stay once a path is accepted.

    Args:
        cached: entries before those of the tree.
        path: accepted nodes, the root first.

    Returns:
        Indices into the entries, those of the tree included, ascending.

    Example:
        >>> kept_entries(3, (0, 2, 5))
        (0, 1, 2, 3, 5, 8)
    """
    return (*range(cached), *(cached + node for node in path))


@dataclass(frozen=True)
class Template:
    """A tree of fixed shape, to be filled with candidates.

    Attributes:
        parents: parent of each node, -1 for the root.
        ranks: which candidate of its parent a node takes, 0 the best; -1 for the root.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def take(self, nodes: Sequence[int]) -> Template:
        """Keep only some nodes.

        Args:
            nodes: ascending, the root first, no node without its parent.
        """
        place = {-1: -1} | {node: new for new, node in enumerate(nodes)}
        return Template(tuple(place[self.parents[node]] for node in nodes), tuple(self.ranks[node] for node in nodes))


def static_tree(paths: Collection[Sequence[int]]) -> Template:
    """Build a template from paths.

    Args:
        paths: per node, the root not counted, the ranks of the candidates that lead to it, in any order.

    Returns:
        The template, level by level, by rank within a level.

    Raises:
        ValueError: if a path is given twice or the one to its parent is missing.

    Example:
        >>> static_tree([[0], [1], [0, 0], [0, 1]])
        Template(parents=(-1, 0, 0, 1, 1), ranks=(-1, 0, 1, 0, 1))
    """
    ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
    numbers: dict[tuple[int, ...], int] = {(): 0}
    parents = [-1]
    for path in ordered:
        if path in numbers:
            raise ValueError(f"path {list(path)} is given twice, or is that of the root; give each node once")
        if path[:-1] not in numbers:
            raise ValueError(f"path {list(path)} hangs from {list(path[:-1])}, which is missing; add it")
        parents.append(numbers[path[:-1]])
        numbers[path] = len(numbers)
    return Template(tuple(parents), (-1, *(path[-1] for path in ordered)))


def counted_tree(counts: Sequence[int]) -> Template:
    """Build a template from numbers of children.

    Args:
        counts: children of each node, breadth first, the root's first; trailing zeros may be left out.

    Returns:
        The template; a node's children take its best candidates.

    Raises:
        ValueError: if there are counts for more nodes than the counts before them make.

    Example:
        >>> counted_tree([2, 1])
        Template(parents=(-1, 0, 0, 1), ranks=(-1, 0, 1, 0))
        >>> len(counted_tree(RECYCLING_COUNTS).parents) - 1
        80
    """
    parents, ranks = [-1], [-1]
    for node, count in enumerate(counts):
        if node >= len(parents):
            raise ValueError(f"counts has {len(counts)} entries, but those before entry {node} make {node} nodes")
        parents += [node] * count
        ranks += range(count)
    return Template(tuple(parents), tuple(ranks))


def _best(values: Sequence[float], count: int) -> list[int]:
    """Places of the highest values, ascending, the first (the root's) not counted; ties to the earlier.

    Where values never rise from a parent to its child, no child is chosen without its parent.
    """
    ranked = sorted(range(1, len(values)), key=lambda place: -values[place])
    return sorted(ranked[:count])


@dataclass(frozen=True)
class Frontier:
    """Nodes that a drafter looks beyond next, the likeliest first.

    Attributes:
        tokens: int64 ``[k]``.
        parents: int64 ``[k]``, place of each node's parent in the frontier before; 0 on level 0, whose nodes
            hang from the root.
        visible: bool ``[k, n + k]``, what each node sees of the n nodes of all frontiers before, in their order,
            and of this one: its ancestors and itself. The root and what is before it are not counted.
        level: 0 for nodes that hang from the root; a node's position is that of the root + 1 + level.
    """

    tokens: Tensor
    parents: Tensor
    visible: Tensor
    level: int


def grow(
    first: Tensor,
    expand: Callable[[Frontier], Tensor],
    *,
    total_tokens: int,
    depth: int,
    top_k: int,
    stop: Collection[int] = (),
) -> Draft:
    """Grow a tree where the drafter is sure of itself (EAGLE-2, arXiv 2406.16858).

    Each node of the frontier gets its likeliest tokens as children, the likeliest of all new nodes are the next
    frontier, and in the end the likeliest of all nodes stay. A node's likelihood is that of its whole path.

    Args:
        first: ``[V]`` log-probabilities of what follows the root, over the whole vocabulary; ``-inf`` for
            tokens that are not to be drafted.
        expand: gives the same for each node of a frontier, ``[k, V]``.
        total_tokens: tokens to draft at most, the root not counted.
        depth: calls of ``expand`` at most; the tree is at most one level deeper.
        top_k: children of a node and nodes of a frontier at most.
        stop: tokens beyond which nothing is drafted.

    Returns:
        The draft. Equal likelihood: the node made earlier, that is the one with the likelier parent, then the
        lower token.

    Example:
        >>> table = torch.tensor([[0.1, 0.9], [0.6, 0.4]]).log()
        >>> draft = grow(table[0], lambda frontier: table[frontier.tokens], total_tokens=3, depth=1, top_k=2)
        >>> draft.tokens, draft.parents
        ((1, 0, 1), (0, 1, 1))
    """
    return grow_scored(first, expand, total_tokens=total_tokens, depth=depth, top_k=top_k, stop=stop)[0]


def grow_scored(
    first: Tensor,
    expand: Callable[[Frontier], Tensor],
    *,
    total_tokens: int,
    depth: int,
    top_k: int,
    stop: Collection[int] = (),
) -> tuple[Draft, tuple[float, ...]]:
    """Do what :func:`grow` does and also tell the log-likelihood of each drafted token's path."""
    tokens, parents, scores = [-1], [-1], [0.0]
    frontier: list[int] = [0]
    seen: dict[int, list[int]] = {0: []}
    expanded, rows = 0, first[None]
    for level in range(depth + 1):
        made = len(tokens)
        for node, ranked in zip(frontier, _likeliest(rows, top_k), strict=True):
            for token, log in ranked:
                tokens.append(token)
                parents.append(node)
                # Rounding may lift a log-probability above 0, and a child above its parent.
                scores.append(scores[node] + min(log, 0.0))
        live = [node for node in range(made, len(tokens)) if tokens[node] not in stop]
        following = sorted(live, key=lambda node: -scores[node])[:top_k]
        if level == depth or not following:
            break
        place = {node: index for index, node in enumerate(frontier)}
        visible = torch.zeros(len(following), expanded + len(following), dtype=torch.bool)
        for index, node in enumerate(following):
            seen[node] = [*seen[parents[node]], expanded + index]
            visible[index, seen[node]] = True
        expanded += len(following)
        rows = expand(
            Frontier(
                torch.tensor([tokens[node] for node in following], device=first.device),
                torch.tensor([place[parents[node]] for node in following], device=first.device),
                visible.to(first.device),
                level,
            )
        )
        frontier = following
    kept = _best(scores, total_tokens)
    number = {0: 0} | {node: new for new, node in enumerate(kept, start=1)}
    draft = Draft(tuple(tokens[node] for node in kept), tuple(number[parents[node]] for node in kept))
    return draft, tuple(scores[node] for node in kept)


def _likeliest(rows: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Per row ``[k, V]`` the likeliest tokens with their logs; ties, which ``topk`` breaks anyhow, to the lower."""
    least = rows.topk(min(count, rows.shape[-1]), dim=-1).values[:, -1:]
    places = torch.nonzero((rows >= least) & (rows > -torch.inf), as_tuple=True)
    found: list[list[tuple[int, float]]] = [[] for _ in range(len(rows))]
    # One copy to the host for the three: float64 holds the integers exactly.
    for row, token, log in torch.stack([part.double() for part in (*places, rows[places])], dim=-1).tolist():
        found[int(row)].append((int(token), log))
    return [sorted(ranked, key=lambda pair: -pair[1])[:count] for ranked in found]
