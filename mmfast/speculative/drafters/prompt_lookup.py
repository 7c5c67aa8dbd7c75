"""Prompt lookup: what followed the last words before may follow them again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mmfast.registry import register
from mmfast.speculative.base import Draft, Drafter, EachRow, Request, RowSession, Session, Verified
from mmfast.token_pruning.base import check_choice

BREAK = -1
"""Stands in a text where it is interrupted: for tokens that are never drafted, and between texts."""


class Match(NamedTuple):
    """Where a text continues what another ends with.

    Attributes:
        start: place of the first token of the n-gram; -1 if there is no match.
        ngram: tokens that agree; 0 if there is no match.
        draft: what follows them.
    """

    start: int = -1
    ngram: int = 0
    draft: tuple[int, ...] = ()


class Ngrams:
    """Where the n-grams of a text that grows are followed by a token that may be drafted.

    A token costs a few look-ups, whatever the length of the text. An n-gram that ends the text or stands
    before an interruption is not found.

    Args:
        longest: tokens of the longest n-gram.
        shortest: of the shortest.
        excluded: tokens that interrupt the text.
        policy: which of several places counts, the ``"first"`` or the ``"last"``.

    Example:
        >>> text = Ngrams(2, 1)
        >>> text.extend([5, 6, 7, 8, 5, 6, 9, 5, 6])
        >>> text.find(text.tail, 3)
        Match(start=4, ngram=2, draft=(9, 5, 6))
    """

    def __init__(
        self,
        longest: int,
        shortest: int = 1,
        excluded: Collection[int] = (),
        policy: Literal["first", "last"] = "last",
    ) -> None:
        self.longest, self.shortest, self.excluded, self.policy = longest, shortest, excluded, policy
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._whole = 0

    def add(self, token: int) -> None:
        """Append a token."""
        place = len(self.tokens)
        if token < 0 or token in self.excluded:
            self.tokens.append(BREAK)
            self._whole = 0
            return
        for length in range(self.shortest, min(self._whole, self.longest) + 1):
            ngram = tuple(self.tokens[place - length :])
            if self.policy == "last":
                self._after[ngram] = place
            else:
                self._after.setdefault(ngram, place)
        self.tokens.append(token)
        self._whole += 1

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self.add(token)

    @property
    def tail(self) -> tuple[int, ...]:
        """The end of the text up to the last interruption, as far as n-grams reach."""
        length = min(self._whole, self.longest)
        return tuple(self.tokens[len(self.tokens) - length :])

    def find(self, tail: Sequence[int], count: int) -> Match:
        """Find the longest n-gram that ``tail`` ends with, and up to ``count`` tokens that follow it."""
        for length in range(min(len(tail), self.longest), self.shortest - 1, -1):
            place = self._after.get(tuple(tail[len(tail) - length :]))
            if place is not None:
                return Match(place - length, length, self.after(place, count))
        return Match()

    def after(self, place: int, count: int) -> tuple[int, ...]:
        """Return up to ``count`` tokens from a place on, up to an interruption."""
        found = self.tokens[place : place + count]
        return tuple(found[: found.index(BREAK)] if BREAK in found else found)


class Answers:
    """Earlier answers, the newest up to a number of tokens, kept as an index over calls.

    Args:
        room: tokens that are kept at most.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._kept: list[tuple[int, ...]] = []
        self._size = 0

    def add(self, answer: Sequence[int]) -> bool:
        """Take an answer; return whether older ones had to go, so that an index over them is out of date."""
        kept = tuple(answer[: self.room])
        if not kept:
            return False
        self._kept.append(kept)
        self._size += len(kept)
        if self._size <= self.room:
            return False
        # Half of the room is freed at once, so that an index is seldom made anew.
        while len(self._kept) > 1 and self._size > self.room // 2:
            self._size -= len(self._kept.pop(0))
        return True

    def __iter__(self) -> Any:
        return iter(self._kept)


@register("prompt_lookup", stage="decode", paper="arXiv 2304.04487", source="apoorvumang/prompt-lookup-decoding")
@dataclass(frozen=True)
class PromptLookup(Drafter):
    """Draft what followed the last tokens of the answer where they stood before, in the prompt or the answer.

    The longest n-gram wins; the longer it is, the more is copied: a single token is no reason to copy more than
    two. Placeholders of images interrupt the text: nothing is matched or copied across them. Answers of earlier
    calls are searched too, after the text of this one.

    Paper: "Inference with Reference: Lossless Acceleration of Large Language Models", which copied from given texts
    first; the rule is the simpler one of the source, which has no paper.

    Attributes:
        num_draft: most tokens to draft.
        max_ngram: tokens of the longest n-gram.
        min_ngram: tokens of the shortest.
        policy: which of several places of an n-gram counts, the ``"first"``, as in the original, or the ``"last"``.
        remember: tokens of earlier answers that are searched; 0 for none.
    """

    num_draft: int = 10
    max_ngram: int = 4
    min_ngram: int = 1
    policy: Literal["first", "last"] = "last"
    remember: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("num_draft", self.num_draft, 1)
        check_number("min_ngram", self.min_ngram, 1)
        check_number("max_ngram", self.max_ngram, self.min_ngram)
        check_number("remember", self.remember, 0)
        check_choice("policy", self.policy, ["first", "last"])

    @property
    def most(self) -> int:
        """Tokens it proposes at most."""
        return self.num_draft

    def start(self, request: Request) -> Session:
        """Read the prompts."""
        return _Lookup(self, request)

    def ngrams(self, excluded: Collection[int]) -> Ngrams:
        """Make an empty index."""
        return Ngrams(self.max_ngram, self.min_ngram, excluded, self.policy)


def fitting(ngram: int, most: int, slow: bool) -> int:
    """Say how many tokens a match is good for.

    Args:
        ngram: tokens that agree.
        most: never more than this.
        slow: whether every verified token costs time, as on a CPU.

    Example:
        >>> [fitting(ngram, 10, False) for ngram in (1, 2, 3, 4)], fitting(3, 10, True)
        ([2, 6, 8, 10], 2)
    """
    if ngram == 1 or (slow and ngram < 4):
        return min(most, 2)
    return min(most, 2 * ngram + 2)


def clipped(tokens: Sequence[int], stop: Collection[int]) -> tuple[int, ...]:
    """End a chain with the first token that ends an answer.

    Example:
        >>> clipped((4, 2, 7), {2})
        (4, 2)
    """
    end = next((place + 1 for place, token in enumerate(tokens) if token in stop), len(tokens))
    return tuple(tokens[:end])


def allowed(tokens: Sequence[int], vocabulary: int) -> tuple[int, ...]:
    """Cut a chain before the first token that the model has no logits for.

    Example:
        >>> allowed((4, 32001, 7), 32000)
        (4,)
    """
    end = next((place for place, token in enumerate(tokens) if not 0 <= token < vocabulary), len(tokens))
    return tuple(tokens[:end])


class _Lookup(EachRow):
    def __init__(self, drafter: PromptLookup, request: Request) -> None:
        self.drafter, self.request, self.memory = drafter, request, request.memory
        if "answers" not in self.memory:
            self.memory |= {"answers": Answers(drafter.remember), "ngrams": drafter.ngrams(request.excluded)}
        self.texts = [_Row(drafter, request, row, self.memory) for row in range(len(request.prompts))]
        super().__init__(self.texts)

    def close(self) -> None:
        """Remember the answers."""
        answers = self.memory["answers"]
        for text in self.texts:
            if answers.add(text.answer):
                self.memory["ngrams"] = self.drafter.ngrams(self.request.excluded)
                new = [token for kept in answers for token in (*kept, BREAK)]
            else:
                new = [*text.answer[: answers.room], BREAK]
            self.memory["ngrams"].extend(new)


class _Row(RowSession):
    def __init__(self, drafter: PromptLookup, request: Request, row: int, memory: dict[str, Any]) -> None:
        self.drafter, self.request, self.memory = drafter, request, memory
        self.slow = request.device.type == "cpu"
        self.answer = [request.first[row]]
        self.text = drafter.ngrams(request.excluded)
        self.text.extend((*request.prompts[row], request.first[row]))

    def propose(self, root: int, budget: int) -> Draft:
        if root in self.request.stop:
            return Draft()
        tail, most = self.text.tail, min(budget, self.drafter.num_draft)
        match = self.text.find(tail, most)
        if match.ngram < len(tail):
            other = self.memory["ngrams"].find(tail, most)
            match = other if other.ngram > match.ngram else match
        found = allowed(match.draft[: fitting(match.ngram, most, self.slow)], self.request.vocabulary)
        return Draft(clipped(found, self.request.stop))

    def observe(self, verified: Verified) -> None:
        self.answer += verified.emitted
        self.text.extend(verified.emitted)


def check_number(field: str, value: object, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number of a range.

    Raises:
        ValueError: naming field, value and range.

    Example:
        >>> check_number("num_draft", 0, 1)
        Traceback (most recent call last):
        ...
        ValueError: num_draft=0 must be an int of at least 1
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{field}={value!r} must be an int {limits}")
