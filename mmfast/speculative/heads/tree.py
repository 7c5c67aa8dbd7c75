"""Trees of fixed shape, and the drafters that fill them."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from mmfast.speculative.base import Draft, check_count
from mmfast.speculative.heads.stream import HeadDrafter
from mmfast.speculative.tree import Template, children, static_tree

H = TypeVar("H", bound=nn.Module)


@cache
def best_shape(total_tokens: int, depth: int, top_k: int) -> Template:
    """Choose the shape of a tree whose every level takes the likeliest tokens.

    The shape assumes that the candidate of rank r (0 the best) follows with a chance of ``0.6 / (r + 1) ** 1.5`` on
    the first level, and 0.85 of that on each further one; the nodes reached with the highest chance are taken.

    Args:
        total_tokens: nodes, the root not counted.
        depth: levels.
        top_k: candidates per node.

    Example:
        >>> best_shape(4, 3, 10).parents
        (-1, 0, 0, 1, 3)
    """
    heap: list[tuple[float, tuple[int, ...]]] = [(-_chance(1, 0), (0,))]
    chosen: list[tuple[int, ...]] = []
    while heap and len(chosen) < total_tokens:
        value, path = heapq.heappop(heap)
        chosen.append(path)
        level, rank = len(path), path[-1]
        if rank + 1 < top_k:
            heapq.heappush(heap, (value * _chance(level, rank + 1) / _chance(level, rank), (*path[:-1], rank + 1)))
        if level < depth:
            heapq.heappush(heap, (value * _chance(level + 1, 0), (*path, 0)))
    return static_tree(chosen)


def _chance(level: int, rank: int) -> float:
    return float(0.6 * 0.85 ** (level - 1) / (rank + 1) ** 1.5)


class Filling:
    """A tree of fixed shape that is filled level by level.

    Args:
        shape: the shape.
        stop: tokens beyond which nothing is drafted.
    """

    def __init__(self, shape: Template, stop: Collection[int]) -> None:
        self._children, self._ranks, self._stop = children(shape.parents), shape.ranks, stop
        self._tokens: list[int] = []
        self._parents: list[int] = []
        # Node of the shape -> number in the draft, of the level that was filled last.
        self._level = {0: 0}

    def open(self) -> list[int]:
        """Nodes of the last level that get children, as numbers in the draft."""
        return [number for node, number in self._level.items() if self._children[node]]

    def width(self) -> int:
        """Most children a node of the last level gets."""
        return max(len(self._children[node]) for node in self._level)

    def fill(self, likeliest: Mapping[int, Sequence[int]]) -> None:
        """Hang children from the last level.

        Args:
            likeliest: per open node its candidates, the best first; fewer than the shape has where there are no more.
        """
        level = {}
        for node, number in self._level.items():
            for child in self._children[node]:
                if self._ranks[child] >= len(likeliest[number]):
                    continue
                token = likeliest[number][self._ranks[child]]
                self._tokens.append(token)
                self._parents.append(number)
                if token not in self._stop:
                    level[child] = len(self._tokens)
        self._level = level

    def path(self, number: int) -> list[int]:
        """Tokens from the first level to a node."""
        found = []
        while number > 0:
            found.append(self._tokens[number - 1])
            number = self._parents[number - 1]
        return found[::-1]

    def draft(self) -> Draft:
        """Return what was filled."""
        return Draft(tuple(self._tokens), tuple(self._parents))


def likeliest(logs: Tensor, count: int) -> list[list[int]]:
    """Return the tokens of the highest log-probabilities of each row ``[k, V]``; none of ``-inf``."""
    values, tokens = logs.topk(min(count, logs.shape[-1]), dim=-1)
    possible = (values > -torch.inf).tolist()
    return [
        [token for token, is_possible in zip(row, row_possible, strict=True) if is_possible]
        for row, row_possible in zip(tokens.tolist(), possible, strict=True)
    ]


def filled(shape: Template, levels: Tensor, stop: Collection[int]) -> Draft:
    """Fill a tree in which the level alone decides the candidates.

    Args:
        shape: the shape, of at most as many levels as there are laws.
        levels: ``[depth, V]`` log-probabilities of each level.
        stop: tokens beyond which nothing is drafted.

    Example:
        >>> levels = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.4, 0.1]]).log()
        >>> draft = filled(best_shape(4, 2, 2), levels, stop={1})
        >>> draft.tokens, draft.parents
        ((2, 1, 0, 1), (0, 0, 1, 1))
    """
    filling = Filling(shape, stop)
    for row in levels:
        if not filling.open():
            break
        best = likeliest(row[None], filling.width())[0]
        filling.fill(dict.fromkeys(filling.open(), best))
    return filling.draft()


@dataclass(frozen=True)
class ShapeDrafter(HeadDrafter[H]):
    """Base of drafters that fill a tree of fixed shape.

    Attributes:
        path: where the weights lie; empty for those of the embedded model.
        total_tokens: tokens drafted at most, the root not counted.
        depth: levels at most, and no more than the head has.
        top_k: candidates of a node at most.
    """

    trees: ClassVar[bool] = True

    total_tokens: int = 63
    depth: int = 4
    top_k: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("total_tokens", "depth", "top_k"):
            check_count(name, getattr(self, name))

    @property
    def most(self) -> int:
        """Tokens of the tree."""
        return self.total_tokens

    def shape(self, budget: int, levels: int) -> Template:
        """Return the shape for at most ``budget`` tokens and ``levels`` levels."""
        return best_shape(min(budget, self.total_tokens), min(self.depth, levels), self.top_k)
