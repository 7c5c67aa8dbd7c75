"""How much to draft: the controller that measures what drafting is worth, and stops it where it is not.

Nothing here reads a clock or draws a number: what was measured comes in as arguments, so that the same
measurements always give the same decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

from mmfast.speculative.goodput import Curve, Goodput, best, tabulated

_FRESH = 512
"""Rounds after which a measured time no longer counts, where newer ones exist."""


class _Evidence:
    """How often the i-th node of a draft exists and is accepted; the old counts less and less."""

    ASKED, UNASKED = 0.97, 0.995

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.drafted: list[float] = []
        self.hit: list[float] = []
        self.rounds = 0

    def add(self, budget: int, drafted: int, path: frozenset[int]) -> None:
        """Take note of a draft of at most ``budget`` nodes, of which those in ``path`` were accepted."""
        self.rounds += 1
        while len(self.asked) < budget:
            self.asked.append(0.0)
            self.drafted.append(0.0)
            self.hit.append(0.0)
        for place in range(len(self.asked)):
            node, asked = place + 1, place < budget
            fade = self.ASKED if asked else self.UNASKED
            self.asked[place] = self.asked[place] * fade + asked
            self.drafted[place] = self.drafted[place] * fade + (asked and node <= drafted)
            self.hit[place] = self.hit[place] * fade + (asked and node in path)

    def cut(self, nodes: int, weight: float) -> None:
        """Forget all nodes but the first ``nodes``, and of these what is more than ``weight`` rounds."""
        for counts in (self.hit, self.drafted, self.asked):
            del counts[nodes:]
        for place, asked in enumerate(self.asked):
            scale = min(1.0, weight / asked) if asked else 1.0
            self.asked[place] *= scale
            self.drafted[place] *= scale
            self.hit[place] *= scale

    @property
    def known(self) -> int:
        """Nodes of which enough is known."""
        return next((place for place, asked in enumerate(self.asked) if asked < 1.0), len(self.asked))

    def rates(self, nodes: int) -> tuple[list[float], list[float]]:
        """Return per node how often it is drafted, and how often accepted; continued where nothing is known."""
        known = min(self.known, nodes)
        exist, hits, before = [], [], 1.0
        for asked, drafted, hit in zip(self.asked[:known], self.drafted, self.hit, strict=False):
            # The first few rounds alone should not condemn a drafter: half as good as the node before, fading.
            doubt = max(0.0, 1.0 - asked / 8.0)
            exist.append((drafted + doubt) / (asked + doubt))
            before = (hit + doubt * 0.5 * before) / (asked + doubt)
            hits.append(before)
        falls = 0.5
        if known == 1:
            falls = hits[0]
        elif known > 1:
            half = known // 2
            first, last = sum(hits[:half]), sum(hits[known - half :])
            falls = min(1.0, (last / first) ** (1.0 / (known - half))) if first > 0.0 else 0.0
        for _ in range(known, nodes):
            exist.append(exist[-1] if exist else 1.0)
            before *= falls
            hits.append(before)
        return exist, hits


class _Pool:
    """What is decided for drafts of one kind of match."""

    def __init__(self, start: int) -> None:
        self.evidence = _Evidence()
        self.size = start
        self.now = start
        self.tick = -1
        self.most = 1
        self.since = 0
        self.decide_at = 0
        self.widen_at = 0
        self.full = 0.0
        self.useful = 0.5
        self.run = 0
        self.interval = Adaptive.PROBE // 2
        self.probe_at = 0
        self.look_at = -1
        self.tries = 0
        self.hit = False
        self.misses = 0


class Adaptive:
    """Choose how many tokens to draft by what rounds cost and what they give; nothing where nothing is gained.

    Measures the seconds of the model's forward by its number of rows and those of drafting by the number of
    tokens, and how often the i-th node of a draft is accepted; every few rounds the size that gives most
    tokens per second is chosen. A new size must promise 3 % more, but drafting stops as soon as it promises
    less than no drafting. While it is off, one round in 32 drafts a single token, after failures ever more
    seldom, down to one in 512. What drafting has cost in vain is kept account of and is limited to under
    2 % of the time beyond the first few rounds, whatever the drafter does.

    Each round the loop calls :meth:`budget` for every row, then :meth:`drafting` if the drafter ran, then
    :meth:`cost`, and :meth:`record` for every row; the last two in any order, in rounds without a draft too. One
    controller serves one drafter with one number of rows; kept over calls, it knows the costs from the start.

    Args:
        start: tokens to draft before anything is known.
        off: whether drafting may stop altogether.

    Raises:
        ValueError: if ``start`` is no int of at least 1.

    Example:
        >>> control = Adaptive(start=2)
        >>> for _ in range(40):
        ...     size = control.budget(0, most=8)
        ...     control.drafting(size, 0.001 * size)
        ...     control.cost(1 + size, 0.100 + 0.001 * size)
        ...     control.record(0, drafted=size, accepted=size, depth=size)
        >>> control.budget(0, most=8)
        8
    """

    EVERY = 8
    """Rounds between decisions."""
    REFRESH = 64
    """Rounds after which the plain forward is timed again, and longer drafts may be tried again."""
    PROBE = 32
    """Rounds to the first probe after drafting stopped."""
    SELDOM = 512
    """Most rounds between probes."""
    MARGIN = 1.03
    """How much better another size must be."""
    LONG = 4
    """Tokens of a long match."""

    def __init__(self, start: int = 4, off: bool = True) -> None:
        if isinstance(start, bool) or not isinstance(start, int) or start < 1:
            raise ValueError(f"start={start!r} must be an int of at least 1: tokens to draft before anything is known")
        self.start = start
        self.off = off
        self._verify = Curve()
        self._draft = Curve(origin=True)
        self._pools: dict[int, _Pool] = {}
        self._given: dict[int, tuple[_Pool, int]] = {}
        self._tick = 0
        self._settled = 0
        self._plain_at = 0
        self._refresh = self.REFRESH
        self._spent = 0.0
        self._gained: list[int] = []
        self._asked = False
        self._debt = 0.0
        self._tokens = 0.0

    def budget(self, row: int, most: int, match_hint: int | None = None) -> int:
        """Say how many tokens to draft for a row in this round.

        Args:
            row: the row.
            most: most tokens that could be used: the drafter's limit, or what is left of the answer.
            match_hint: tokens of the context the drafter has found again, where it knows that before it drafts;
                short and long matches are judged apart.

        Returns:
            A number from 0 (do not ask the drafter) to ``most``.
        """
        if self._settled < self._tick:
            self._settle()
        kind = 0 if match_hint is None else 1 + (match_hint >= self.LONG)
        pool = self._pools.setdefault(kind, _Pool(self.start))
        if pool.tick != self._tick:
            pool.tick = self._tick
            pool.now = self._review(pool)
        pool.most = max(pool.most, most)
        size = max(0, min(pool.now, most))
        self._given[row] = (pool, size)
        self._asked = self._asked or size > 0
        return size

    def drafting(self, tokens: int, seconds: float) -> None:
        """Take note of the time of the drafter in this round, and of the most tokens it drafted for a row."""
        self._spend(seconds, self._draft.add(tokens, seconds, self._tick))

    def cost(self, rows: int, seconds: float) -> None:
        """Take note of the time of the model's forward: ``rows`` nodes per row, the root included, at most."""
        if rows == 1:
            if self._verify.count(1) >= 3:
                steady = abs(seconds / max(self._verify.median(1), 1e-12) - 1.0) <= 0.1
                self._refresh = min(4 * self.REFRESH, 2 * self._refresh) if steady else self.REFRESH
            self._plain_at = self._tick
        self._spend(seconds, self._verify.add(rows, seconds, self._tick))
        self._tick += 1

    def record(self, row: int, drafted: int, accepted: int, depth: int, path: Sequence[int] = ()) -> None:
        """Take note of what became of a row's draft.

        Args:
            row: the row.
            drafted: nodes drafted, the root not counted; 0 for none.
            accepted: how many of them were accepted.
            depth: tokens on the longest path of the draft; ``drafted`` for a chain.
            path: for a tree the numbers of the accepted nodes, from 1. Not given, they are taken to stand
                evenly among the nodes, level by level.
        """
        pool, budget = self._given.pop(row, (None, 0))
        if pool is None or budget == 0:
            return
        self._gained.append(accepted)
        if not path:
            path = [-(-level * drafted // max(1, depth)) for level in range(1, accepted + 1)]
        pool.evidence.add(max(budget, drafted), drafted, frozenset(path))
        if drafted:
            pool.hit = pool.hit or accepted > 0
            pool.misses += accepted == 0
            pool.full = 0.8 * pool.full + 0.2 * (accepted == depth)
            self._notice(pool, budget, drafted, accepted)

    def _spend(self, seconds: float, first: bool) -> None:
        """Put seconds to the account; of those of a size seen first, no more than may come again."""
        if first and self._verify.count(1):
            seconds = min(seconds, 2.0 * self._verify.median(1))
        self._spent += seconds

    def _notice(self, pool: _Pool, budget: int, drafted: int, accepted: int) -> None:
        """Forget what was seen before a run of misses that could not have come of it."""
        if accepted:
            # The misses of a run count once it is over: it is judged by what was usual before it.
            pool.run, pool.useful = 0, 0.97 ** (pool.run + 1) * pool.useful + 0.03
            return
        pool.run += 1
        if pool.run >= 4 and (1.0 - pool.useful) ** pool.run < 1e-3:
            pool.evidence.cut(len(pool.evidence.asked), 1.0)
            for _ in range(pool.run):
                pool.evidence.add(budget, drafted, frozenset())
            pool.run, pool.useful, pool.decide_at = 0, 0.0, 0

    def _settle(self) -> None:
        """Close the account of the round: what it cost beyond what its tokens would have cost undrafted."""
        self._settled = self._tick
        if self._verify.count(1):
            tokens = 1.0 + (sum(self._gained) / len(self._gained) if self._gained else 0.0)
            self._tokens += tokens
            self._debt *= 1.0 - 1.0 / 2048.0
            if self._asked:
                plain = max(self._verify.median(1), 1e-12)
                self._debt = max(-8.0, self._debt + self._spent / plain - tokens)
        self._spent, self._gained, self._asked = 0.0, [], False

    def _review(self, pool: _Pool) -> int:
        """Say what a pool drafts in this round."""
        few = self._verify.count(1) < 3 and self._tick in (0, 2, 6)
        if few or self._tick - self._plain_at >= self._refresh:
            return 0
        if self.off and self._debt > 6.0 + 0.012 * min(self._tokens, 2048.0):
            return 0
        if pool.size == 0:
            return self._review_off(pool)
        if pool.evidence.rounds >= 4 and self._tick >= pool.decide_at and self._verify.count(1):
            self._decide(pool)
        return pool.size

    def _decide(self, pool: _Pool) -> None:
        pool.decide_at = self._tick + (self.EVERY if pool.evidence.rounds >= 4 * self.EVERY else self.EVERY // 2)
        if pool.full > 0.8 and self._tick >= pool.widen_at:
            # All that is drafted is accepted: what is remembered of longer drafts may be out of date.
            pool.widen_at = self._tick + self.REFRESH
            pool.evidence.cut(pool.size, float("inf"))
        table = self._worth(pool)
        found = best(table if self.off else table[1:])
        if found.length == 0:
            self._stop(pool)
        elif found.speedup > self.MARGIN * table[min(pool.size, len(table) - 1)].speedup:
            pool.size = found.length

    def _stop(self, pool: _Pool) -> None:
        held = self._tick - pool.since >= self.REFRESH and pool.since > 0
        pool.size = 0
        pool.interval = self.PROBE if held else min(self.SELDOM, 2 * pool.interval)
        pool.probe_at = self._tick + pool.interval
        # The plain forward may have become slower unseen; it is timed now, so look again soon.
        pool.look_at = self._tick + 4 if self._tick - self._plain_at > self.EVERY else -1
        pool.tries = 0

    def _review_off(self, pool: _Pool) -> int:
        if self._tick == pool.look_at and self._resume(pool):
            return pool.size
        if self._tick < pool.probe_at:
            return 0
        if pool.tries == 0:
            pool.evidence.cut(1, 2.0)
            pool.hit, pool.misses = False, 0
        elif pool.hit and self._resume(pool):
            return pool.size
        elif pool.misses >= self._patience() or pool.tries >= self.EVERY:
            pool.interval = min(self.SELDOM, 2 * pool.interval)
            pool.probe_at, pool.tries = self._tick + pool.interval, 0
            return 0
        pool.tries += 1
        pool.hit = False
        return 1

    def _patience(self) -> int:
        """Say how many misses end a probe: the cheaper one is, the more."""
        plain = max(self._verify.at(1), 1e-12)
        extra = (self._verify.at(2) + self._draft.at(1)) / plain - 1.0
        return max(1, min(self.EVERY, floor(0.3 / max(extra, 0.01))))

    def _resume(self, pool: _Pool) -> bool:
        """Draft again if that promises enough."""
        table = self._worth(pool)
        found = best(table)
        if found.length == 0 or found.speedup <= self.MARGIN * table[0].speedup:
            return False
        pool.size, pool.since, pool.decide_at, pool.tries = found.length, self._tick, self._tick + self.EVERY, 0
        return True

    def _worth(self, pool: _Pool) -> list[Goodput]:
        """Say what every size up to twice what was tried is worth, in units of a plain forward."""
        self._verify.forget(self._tick - _FRESH)
        self._draft.forget(self._tick - _FRESH)
        limit = max(1, min(pool.most, max(2 * pool.evidence.known, pool.size, self.start)))
        exist, hits = pool.evidence.rates(limit)
        plain = max(self._verify.at(1), 1e-12)
        # A node costs its part only in rounds in which it is drafted.
        spent = [self._verify.at(1 + size) + self._draft.at(size) for size in range(limit + 1)]
        cost, costs = spent[0] / plain, [1.0]
        for size in range(1, limit + 1):
            cost += exist[size - 1] * (spent[size] - spent[size - 1]) / plain
            costs.append(cost)
        return tabulated(hits, costs)
