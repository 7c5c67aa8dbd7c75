"""Lookahead: guess the tokens to come all at once, let the model correct them, and keep the runs it made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.speculative.base import Draft, Drafter, EachRow, Request, RowSession, Session, Verified
from mmfast.speculative.drafters.prompt_lookup import check_number


@register("lookahead", stage="decode", paper="arXiv 2402.02057", source="hao-ai-lab/LookaheadDecoding")
@dataclass(frozen=True)
class Lookahead(Drafter):
    """Draft runs of tokens that came out of guesses the model corrected beside its answer (Jacobi iteration).

    Guesses for the next ``window`` places stand in ``ngram - 1`` generations; the model is asked what follows the
    latest of each place, given its earlier generations and the guesses for the places before. Each answer makes
    an n-gram of the generations of its place, kept by its first token, and becomes the latest generation.

    The official code writes this as a mask of shifted diagonals. That mask is a tree: the first generation is a
    chain from the root, and from each of its places hangs the chain of the later generations. Here it is drafted as
    such a tree, with the n-grams of the pool beside it. Nodes with the same tokens before them are one node, so
    that guesses may be accepted too. Where there is no room for the whole window it has fewer places, and none
    where there is no room for one. First guesses are tokens of the prompt, picked by place and not by chance.

    Paper: "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding".

    Attributes:
        ngram: tokens of an n-gram, its first included (LEVEL).
        window: places ahead that are guessed (WINDOW).
        guesses: n-grams that are kept, and drafted, per first token (GUESS).
        pool_from_prompt: begin with the n-grams of the prompt.
    """

    trees = True

    ngram: int = 5
    window: int = 7
    guesses: int = 7
    pool_from_prompt: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ngram", self.ngram, 3)
        check_number("window", self.window, 1)
        check_number("guesses", self.guesses, 1)
        if not isinstance(self.pool_from_prompt, bool):
            raise ValueError(f"pool_from_prompt={self.pool_from_prompt!r} must be True or False")

    @property
    def most(self) -> int:
        """Tokens it proposes at most."""
        return window_size(self.ngram, self.window) + self.guesses * (self.ngram - 1)

    def start(self, request: Request) -> Session:
        """Read the prompts."""
        return EachRow([_Row(self, request, row) for row in range(len(request.prompts))])


def window_size(ngram: int, places: int) -> int:
    """Return how many tokens a window takes.

    Example:
        >>> window_size(5, 7), window_size(5, 1)
        (27, 3)
    """
    return (places - 1) + (ngram - 2) * places if places else 0


def places_within(ngram: int, window: int, room: int) -> int:
    """Return how many places of a window fit into ``room`` tokens.

    Example:
        >>> places_within(5, 7, 27), places_within(5, 7, 26), places_within(5, 7, 2)
        (7, 6, 0)
    """
    return min(window, (room + 1) // (ngram - 1))


class Pool:
    """N-grams by their first token, the newest first.

    Args:
        guesses: n-grams kept per token.

    Example:
        >>> pool = Pool(2)
        >>> for follows in [(1, 2), (3, 4), (1, 2), (5, 6)]:
        ...     pool.add(9, follows)
        >>> pool.after(9)
        [(5, 6), (1, 2)]
    """

    def __init__(self, guesses: int) -> None:
        self.guesses = guesses
        self._kept: dict[int, list[tuple[int, ...]]] = {}

    def add(self, first: int, follows: tuple[int, ...]) -> None:
        """Keep an n-gram; the one longest unused goes."""
        kept = self._kept.setdefault(first, [])
        if follows in kept:
            kept.remove(follows)
        kept.insert(0, follows)
        del kept[self.guesses :]

    def after(self, first: int) -> list[tuple[int, ...]]:
        """Return what may follow a token."""
        return list(self._kept.get(first, ()))


class Window:
    """The guesses, generation by generation.

    Attributes:
        ngram: tokens of an n-gram.
        first: the first generation, the places 1 to w-1 behind the root.
        later: the generations after it, each with what it says of the places behind ``0..w-1``; up to ``ngram - 2``.

    Args:
        ngram: tokens of an n-gram.
        source: tokens that guesses are picked from.
    """

    def __init__(self, ngram: int, source: Sequence[int]) -> None:
        self.ngram, self.source = ngram, source
        self.first: list[int] = []
        self.later: list[list[int]] = []
        self._picked = 0

    def _pick(self) -> int:
        # Far from each other and never in a short cycle; what is picked matters little, it is corrected.
        self._picked += 1
        return self.source[self._picked * 7919 % len(self.source)]

    def _fit(self, places: int) -> None:
        for row, length in [(self.first, max(0, places - 1)), *((row, places) for row in self.later)]:
            del row[length:]
            row += [self._pick() for _ in range(length - len(row))]
        if not self.later:
            self.later.append([self._pick() for _ in range(places)])

    def paths(self, places: int) -> list[tuple[int, ...]]:
        """Return per place the tokens from the root on to its latest generation; widen or narrow the window to that."""
        if not places:
            return []
        self._fit(places)
        return [(*self.first[:place], *(row[place] for row in self.later)) for place in range(places)]

    def shift(self, root: int, latest: Sequence[int], pool: Pool) -> None:
        """Take what the model says follows each place; keep n-grams once all generations are there."""
        if len(self.later) < self.ngram - 2:
            self.later.append(list(latest))
            return
        for place, (key, last) in enumerate(zip([root, *self.first], latest, strict=True)):
            pool.add(key, (*(row[place] for row in self.later), last))
        self.first = self.later[0][1:]
        self.later = [*self.later[1:], list(latest)]


class Trie:
    """Paths from a root, put together where they begin alike."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def add(self, path: Sequence[int], room: int) -> int:
        """Add a path as far as there is room; return its last node."""
        node = 0
        for token in path:
            below = self._children.get((node, token))
            if below is None:
                if len(self.tokens) >= room:
                    return node
                self.tokens.append(token)
                self.parents.append(node)
                below = self._children[node, token] = len(self.tokens)
            node = below
        return node


class _Row(RowSession):
    def __init__(self, drafter: Lookahead, request: Request, row: int) -> None:
        self.drafter, self.request = drafter, request
        barred = request.excluded | request.stop
        prompt = request.prompts[row]
        plain = [token for token in (*prompt, request.first[row]) if 0 <= token < request.vocabulary]
        self.window = Window(drafter.ngram, [token for token in plain if token not in barred])
        self.pool = Pool(drafter.guesses)
        if drafter.pool_from_prompt:
            self._read(prompt)
        self.barred = torch.tensor(sorted(token for token in barred if 0 <= token < request.vocabulary)).long()
        self.barred = self.barred.to(request.device)
        self.asked: list[int] = []
        self.drafted: tuple[int, ...] = ()

    def _read(self, prompt: Sequence[int]) -> None:
        """Fill the pool from the prompt."""
        bad = [token in self.request.excluded or not 0 <= token < self.request.vocabulary for token in prompt]
        clean = 0
        for place in range(len(prompt)):
            clean = 0 if bad[place] else clean + 1
            if clean >= self.drafter.ngram:
                start = place - self.drafter.ngram + 1
                self.pool.add(prompt[start], tuple(prompt[start + 1 : place + 1]))

    def propose(self, root: int, budget: int) -> Draft:
        self.asked, self.drafted = [], ()
        if root in self.request.stop:
            return Draft()
        budget, trie = min(budget, self.drafter.most), Trie()
        guesses = [self._upto_stop(follows) for follows in self.pool.after(root)]
        # Where room is short, half of it is for what is known and half for what is to be known.
        room = budget if budget == self.drafter.most else min(budget, max(self.drafter.ngram - 1, budget // 2))
        for follows in guesses:
            trie.add(follows, room)
        if self.window.source:
            places = places_within(self.drafter.ngram, self.drafter.window, budget - len(trie.tokens))
            self.asked = [trie.add(path, budget) for path in self.window.paths(places)]
        for follows in guesses:
            trie.add(follows, budget)
        self.drafted = tuple(trie.tokens)
        return Draft(self.drafted, tuple(trie.parents))

    def _upto_stop(self, follows: Sequence[int]) -> Sequence[int]:
        end = next((place + 1 for place, token in enumerate(follows) if token in self.request.stop), len(follows))
        return follows[:end]

    def observe(self, verified: Verified) -> None:
        if not self.asked or verified.tokens[1:] != self.drafted:
            return
        self.window.shift(verified.tokens[0], likeliest(verified.logits[self.asked], self.barred), self.pool)


def likeliest(logits: Tensor, barred: Tensor) -> list[int]:
    """Return the likeliest token of each row ``[n, V]``, of those that are not barred.

    Example:
        >>> likeliest(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([1]))
        [2]
    """
    found: list[int] = logits.index_fill(-1, barred.to(logits.device), -torch.inf).argmax(dim=-1).tolist()
    return found
