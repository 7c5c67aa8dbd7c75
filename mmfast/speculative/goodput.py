"""What drafting is worth: rules for the length of a draft, and the table of what each length gives for its cost.

Nothing here reads a clock or draws a number: what was measured comes in as arguments, so that the same
measurements always give the same decisions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor, log2
from statistics import median_low


def stop_length(accept: Sequence[float], threshold: float, bound: tuple[int, int] = (2, 20)) -> int:
    """Say after how many tokens a drafter stops that knows how likely each is to be accepted.

    The chance of the last drafted token is only known after one more forward of the drafter, so the rule
    looks at those before it: stop once ``1 - product`` exceeds the threshold. The last token stays in the draft.

    Paper: "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths", arXiv 2405.19715.

    Args:
        accept: per drafted token the chance that it is accepted, given that those before it are.
        threshold: how likely a rejection must be.
        bound: fewest and most tokens.

    Example:
        >>> stop_length([0.9, 0.6, 0.9, 0.9], 0.3)
        3
    """
    least, most = bound
    product = 1.0
    for drafted in range(1, len(accept) + 1):
        if drafted >= most or (drafted >= least and 1.0 - product > threshold):
            return drafted
        product *= accept[drafted - 1]
    return len(accept)


def heuristic_length(length: int, accepted: int, drafted: int | None = None) -> int:
    """Lengthen the next draft by two if all of this one was accepted, else shorten it by one.

    Args:
        length: length aimed at so far.
        accepted: how many tokens were accepted.
        drafted: how many were drafted; ``length`` if not given.

    Example:
        >>> heuristic_length(5, 5), heuristic_length(5, 4), heuristic_length(1, 0)
        (7, 4, 1)
    """
    return length + 2 if accepted == (length if drafted is None else drafted) else max(1, length - 1)


@dataclass(frozen=True)
class Goodput:
    """What drafts of one length are worth.

    Attributes:
        length: tokens drafted.
        tokens: tokens a round gives, the model's own included.
        cost: time of a round, in units of a forward of one token.
    """

    length: int
    tokens: float
    cost: float

    @property
    def speedup(self) -> float:
        """Tokens per unit of time."""
        return self.tokens / self.cost


def goodput_table(alpha: float, draft_cost: float, verify_cost: Sequence[float]) -> list[Goodput]:
    """Say what chains of every length are worth if every token is accepted with the same chance.

    Paper: "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput", arXiv 2406.14066.

    Args:
        alpha: chance that a token is accepted, given that those before it are.
        draft_cost: time to draft one token, in units of a forward of one token.
        verify_cost: per length from 0 the time of the forward that verifies it, in the same units.

    Example:
        >>> table = goodput_table(0.7, 0.05, [1.0, 1.02, 1.05])
        >>> [round(entry.speedup, 3) for entry in table], best(table).length
        ([1.0, 1.589, 1.904], 2)
    """
    hits = [alpha**place for place in range(1, len(verify_cost))]
    return tabulated(hits, [length * draft_cost + cost for length, cost in enumerate(verify_cost)])


def best(table: Sequence[Goodput]) -> Goodput:
    """Return the entry of highest speedup; ties go to the shorter draft."""
    return max(table, key=lambda entry: (entry.speedup, -entry.length))


def tabulated(hits: Sequence[float], costs: Sequence[float]) -> list[Goodput]:
    """Put together what each length is worth; ``hits[i]``: chance that the ``i+1``-th node is accepted."""
    table, tokens = [], 1.0
    for length, cost in enumerate(costs):
        tokens += hits[length - 1] if length else 0.0
        table.append(Goodput(length, tokens, cost))
    return table


class Curve:
    """Seconds by size, from measurements of which some are far off: medians that never fall with the size.

    Sizes above 8 share a median with their neighbours. A size that was measured once does not count where two others
    were measured more often: the first time is often that of preparations. Between sizes that were measured, and
    beyond them, the curve is continued in a straight line; below them it is flat.

    Args:
        origin: whether size 0 takes no time as long as it was not measured.
        keep: how many measurements count per size.
    """

    def __init__(self, origin: bool = False, keep: int = 9) -> None:
        self.origin = origin
        self.keep = keep
        self._seen: dict[int, deque[tuple[int, float, int]]] = {}
        self._points: list[tuple[float, float]] | None = None

    def add(self, size: int, seconds: float, tick: int) -> bool:
        """Take note of a measurement made in round ``tick``; return whether it is the first of its size."""
        place = size if size <= 8 else floor(8 * 2 ** (round(4 * log2(size / 8)) / 4))
        seen = self._seen.setdefault(place, deque(maxlen=self.keep))
        seen.append((size, seconds, tick))
        self._points = None
        return len(seen) == 1

    def count(self, size: int) -> int:
        """Return how many measurements of a size up to 8 count."""
        return len(self._seen.get(size, ()))

    def median(self, size: int) -> float:
        """Return the median of the measurements of a size up to 8 that was measured."""
        return median_low(seconds for _, seconds, _ in self._seen[size])

    def forget(self, before: int) -> None:
        """Drop what was measured before a round, but for the newest size."""
        newest = max((seen[-1][2] for seen in self._seen.values()), default=0)
        self._seen = {place: seen for place, seen in self._seen.items() if seen[-1][2] >= min(before, newest)}
        self._points = None

    def at(self, size: float) -> float:
        """Return the seconds of a size; 0 if nothing was measured."""
        if self._points is None:
            self._points = self._fit()
        points = self._points
        if not points:
            return 0.0
        if size <= points[0][0] or len(points) == 1:
            return points[0][1]
        right = next((place for place, (x, _) in enumerate(points) if x >= size), len(points) - 1)
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        return y0 + (y1 - y0) * (size - x0) / (x1 - x0)

    def _fit(self) -> list[tuple[float, float]]:
        # Pool neighbours that fall until none does, the standard way to the closest curve that never falls.
        blocks: list[tuple[list[float], float, int]] = []
        if self.origin and self._seen and 0 not in self._seen:
            blocks.append(([0.0], 0.0, 1))
        trusted = [place for place, seen in self._seen.items() if len(seen) > 1]
        for place in sorted(trusted if len(trusted) > 1 else self._seen):
            seen = self._seen[place]
            middle = sum(size for size, _, _ in seen) / len(seen)
            blocks.append(([middle], median_low(seconds for _, seconds, _ in seen), len(seen)))
            while len(blocks) > 1 and blocks[-2][1] > blocks[-1][1]:
                (left, low, few), (right, high, more) = blocks[-2:]
                blocks[-2:] = [(left + right, (low * few + high * more) / (few + more), few + more)]
        points = [(x, seconds) for sizes, seconds, _ in blocks for x in sizes]
        return [*points[:1], *(after for before, after in pairwise(points) if after[0] > before[0])]
