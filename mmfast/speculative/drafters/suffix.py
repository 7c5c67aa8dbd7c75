"""Suffix decoding: of all places where the text went like this before, go on as most of them did."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import floor
from typing import Any, NamedTuple

from mmfast.registry import register
from mmfast.speculative.base import Draft, Drafter, EachRow, Request, RowSession, Session, Verified
from mmfast.speculative.drafters.prompt_lookup import BREAK, Answers, check_number


@dataclass(slots=True)
class Node:
    """A string that stands in the text more than once.

    Attributes:
        count: how often.
        children: token that follows -> the longer string; a string that stands there once is the place of its
            last token.
    """

    count: int = 0
    children: dict[int, Node | int] = field(default_factory=dict)


class Speculation(NamedTuple):
    """What a text expects to follow.

    Attributes:
        tokens: the tokens.
        parents: per token the one it hangs from, as in ``Draft``.
        probs: per token the share of places at which the path to it follows.
        match: tokens of context that agree.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    probs: tuple[float, ...] = ()
    match: int = 0

    @property
    def score(self) -> float:
        """How many of the tokens the text leads to expect."""
        return sum(self.probs)


class SuffixTree:
    """The strings of a text that grows, with how often each stands there.

    Strings that stand there once are kept as a place in the text and written out only when they come again, so that
    a token costs as many steps as tokens before it stood before in the same order.

    Args:
        depth: tokens of the longest string.
        excluded: tokens that interrupt the text.

    Example:
        >>> tree = SuffixTree()
        >>> tree.extend([1, 2, 3, 4, -1, 2, 3, 4, -1, 2, 3, 5, -1])
        >>> tree.speculate(tree.match([9, 2, 3]), 4)
        Speculation(tokens=(4,), parents=(0,), probs=(0.6666666666666666,), match=2)
    """

    def __init__(self, depth: int = 64, excluded: Collection[int] = ()) -> None:
        self.depth, self.excluded = depth, excluded
        self.tokens: list[int] = []
        self.root = Node()
        self.ends: list[Node] = []
        """The strings the text ends with that stood there before too, the shortest first."""

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token."""
        if token < 0 or token in self.excluded:
            self.tokens.append(BREAK)
            self.ends = []
            return
        place = len(self.tokens)
        self.tokens.append(token)
        ends = []
        for length, node in enumerate([self.root, *islice(self.ends, self.depth - 1)], start=1):
            child = node.children.get(token)
            if child is None:
                node.children[token] = place
                continue
            if isinstance(child, int):
                following = self.tokens[child + 1]
                once: dict[int, Node | int] = {}
                if following >= 0 and length < self.depth:
                    once[following] = child + 1
                child = node.children[token] = Node(1, once)
            child.count += 1
            ends.append(child)
        self.ends = ends

    def step(self, found: Sequence[Node | int], token: int) -> list[Node | int]:
        """Follow a context by one token: from the strings it ended with to those it ends with now.

        Args:
            found: what was found of the context so far, the shortest first.
            token: its next token.
        """
        if token < 0 or token in self.excluded:
            return []
        longer: list[Node | int] = []
        for node in (self.root, *found[: self.depth - 1]):
            child = self._child(node, token)
            if child is None:
                break
            longer.append(child)
        return longer

    def match(self, context: Sequence[int]) -> list[Node | int]:
        """Find the strings that a context ends with, the shortest first."""
        found: list[Node | int] = []
        for token in context[-self.depth :]:
            found = self.step(found, token)
        return found

    def _child(self, node: Node | int, token: int) -> Node | int | None:
        if isinstance(node, Node):
            return node.children.get(token)
        after = node + 1
        return after if after < len(self.tokens) and self.tokens[after] == token else None

    def _children(self, node: Node | int) -> Iterable[tuple[int, Node | int]]:
        if isinstance(node, Node):
            return node.children.items()
        after = node + 1
        return [(self.tokens[after], after)] if after < len(self.tokens) and self.tokens[after] >= 0 else []

    def speculate(
        self,
        found: Sequence[Node | int],
        most: int,
        factor: float = 1.0,
        offset: float = 0.0,
        least: float = 0.1,
        tree: bool = False,
    ) -> Speculation:
        """Say what follows, by the string that promises most tokens; ties go to the longer string.

        Args:
            found: the strings the context ends with, the shortest first.
            most: tokens at most.
            factor: tokens per token that agrees.
            offset: tokens beyond that.
            least: share of places below which a token is not proposed.
            tree: propose alternatives too and not only what follows most often.
        """
        best = Speculation()
        counts = [_count(node) for node in found]
        for match, node in enumerate(found, start=1):
            budget = min(most, floor(match * factor + offset + 1e-6))
            if budget < 1:
                continue
            # A longer string that stands at the same places is followed by the same, and may say more of it.
            last = match == len(found)
            if not last and counts[match] == counts[match - 1] and match + 1 + most <= self.depth:
                continue
            proposed = (self._spread if tree else self._line)(node, match, budget, least)
            if proposed.tokens and proposed.score >= best.score:
                best = proposed
        return best

    def _line(self, node: Node | int, match: int, budget: int, least: float) -> Speculation:
        tokens: list[int] = []
        probs: list[float] = []
        prob = 1.0
        while len(tokens) < min(budget, self.depth - match):
            total = _count(node)
            token, node = min(self._children(node), key=lambda pair: (-_count(pair[1]), pair[0]), default=(BREAK, node))
            if token < 0:
                break
            prob *= _count(node) / total
            if prob < least:
                break
            tokens.append(token)
            probs.append(prob)
        return Speculation(tuple(tokens), tuple(range(len(tokens))), tuple(probs), match)

    def _spread(self, node: Node | int, match: int, budget: int, least: float) -> Speculation:
        heap: list[tuple[float, int, int, int, Node | int]] = []
        tokens: list[int] = []
        parents: list[int] = []
        probs: list[float] = []
        made = 0

        def push(parent: int, above: Node | int, prob: float, depth: int) -> None:
            nonlocal made
            if match + depth > self.depth:
                return
            ranked = sorted(self._children(above), key=lambda pair: (-_count(pair[1]), pair[0]))
            for token, child in islice(ranked, budget):
                share = prob * _count(child) / _count(above)
                if share >= least:
                    heapq.heappush(heap, (-share, made, parent, depth, child))
                    waiting[made] = token
                    made += 1

        waiting: dict[int, int] = {}
        push(0, node, 1.0, 1)
        while heap and len(tokens) < budget:
            share, number, parent, depth, child = heapq.heappop(heap)
            tokens.append(waiting[number])
            parents.append(parent)
            probs.append(-share)
            push(len(tokens), child, -share, depth + 1)
        return Speculation(tuple(tokens), tuple(parents), tuple(probs), match)


def _count(node: Node | int) -> int:
    return node.count if isinstance(node, Node) else 1


@register("suffix", stage="decode", paper="arXiv 2411.04975", source="snowflakedb/ArcticInference")
@dataclass(frozen=True)
class Suffix(Drafter):
    """Draft what most often followed the end of the answer, in the prompt, the answer and earlier answers.

    Of all lengths of context the one is taken that leads to expect most tokens. Placeholders of images interrupt
    the text.

    Paper: "SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications".

    Attributes:
        num_draft: most tokens to draft.
        factor: tokens to draft per token of context that agrees.
        offset: tokens to draft beyond that.
        min_prob: share of places below which a token is not drafted.
        min_score: drafts that lead to expect fewer tokens are not made.
        max_depth: tokens of the longest string that is counted.
        tree: draft alternatives too; the model's attention then needs a mask.
        remember: tokens of earlier answers that are counted; 0 for none.
    """

    num_draft: int = 16
    factor: float = 1.0
    offset: float = 0.0
    min_prob: float = 0.1
    min_score: float = 0.0
    max_depth: int = 64
    tree: bool = False
    remember: int = 65536

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("num_draft", self.num_draft, 1)
        check_number("max_depth", self.max_depth, 2)
        check_number("remember", self.remember, 0)
        for name, least, most in (("factor", 0, 64), ("offset", -64, 64), ("min_prob", 0, 1), ("min_score", 0, 64)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise ValueError(f"{name}={value!r} must be a number from {least} to {most}")
        if not isinstance(self.tree, bool):
            raise ValueError(f"tree={self.tree!r} must be True or False")
        # Said of the object and not of the class: only some objects draft trees.
        object.__setattr__(self, "trees", self.tree)

    @property
    def most(self) -> int:
        """Tokens it proposes at most."""
        return self.num_draft

    def start(self, request: Request) -> Session:
        """Read the prompts."""
        return _Session(self, request)


class _Session(EachRow):
    def __init__(self, drafter: Suffix, request: Request) -> None:
        self.drafter, self.request, self.memory = drafter, request, request.memory
        if "answers" not in self.memory:
            self.memory |= {"answers": Answers(drafter.remember), "tree": self._empty()}
        self.texts = [_Row(drafter, request, row, self.memory["tree"]) for row in range(len(request.prompts))]
        super().__init__(self.texts)

    def _empty(self) -> SuffixTree:
        return SuffixTree(self.drafter.max_depth, self.request.excluded)

    def close(self) -> None:
        """Remember the answers."""
        answers = self.memory["answers"]
        for text in self.texts:
            if answers.add(text.answer):
                self.memory["tree"] = self._empty()
                new = [token for kept in answers for token in (*kept, BREAK)]
            else:
                new = [*text.answer[: answers.room], BREAK]
            self.memory["tree"].extend(new)


class _Row(RowSession):
    def __init__(self, drafter: Suffix, request: Request, row: int, past: SuffixTree) -> None:
        self.drafter, self.request, self.past = drafter, request, past
        self.own = SuffixTree(drafter.max_depth, request.excluded)
        self.own.extend((*request.prompts[row], request.first[row]))
        self.answer = [request.first[row]]
        self.found = past.match((*request.prompts[row][-drafter.max_depth :], request.first[row]))

    def propose(self, root: int, budget: int) -> Draft:
        if root in self.request.stop:
            return Draft()
        options = self.drafter
        settings: dict[str, Any] = {
            "most": min(budget, options.num_draft),
            "factor": options.factor,
            "offset": options.offset,
            "least": options.min_prob,
            "tree": options.tree,
        }
        own = self.own.speculate(self.own.ends, **settings)
        past = self.past.speculate(self.found, **settings)
        best = past if (past.score, past.match) > (own.score, own.match) else own
        return Draft() if best.score < options.min_score else self._legal(best)

    def _legal(self, found: Speculation) -> Draft:
        """Leave out what the model cannot say and what would follow the end of an answer."""
        place: dict[int, int] = {0: 0}
        tokens: list[int] = []
        parents: list[int] = []
        for number, (token, parent) in enumerate(zip(found.tokens, found.parents, strict=True), start=1):
            above = place.get(parent)
            if above is None or not 0 <= token < self.request.vocabulary:
                continue
            if above and tokens[above - 1] in self.request.stop:
                continue
            tokens.append(token)
            parents.append(above)
            place[number] = len(tokens)
        return Draft(tuple(tokens), tuple(parents) if self.drafter.tree else ())

    def observe(self, verified: Verified) -> None:
        self.answer += verified.emitted
        self.own.extend(verified.emitted)
        for token in verified.emitted:
            self.found = self.past.step(self.found, token)
