"""Adaptive length: what it costs where drafting is in vain, how near it comes to the best, what it notices."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from mmfast.speculative.adaptive import Adaptive
from mmfast.speculative.goodput import Curve, best, goodput_table, heuristic_length, stop_length

Seconds = Callable[[int, int], float]
"""Rows or tokens, tokens given so far -> seconds."""


def processor(rows: int, given: int = 0) -> float:
    """Take the time of a CPU: the second row is almost free, each further one costs."""
    return 0.1 * (1.0 if rows == 1 else 1.06 if rows == 2 else 1.0 + 0.15 * (rows - 1))


def device(rows: int, given: int = 0) -> float:
    """Take the time of a large GPU."""
    return 0.02 * (1.0 + 0.002 * (rows - 1))


def busy(rows: int, given: int = 0) -> float:
    """Take the time of a device that has no room: every row costs as much as the first."""
    return 0.1 * rows


def found(tokens: int, given: int = 0) -> float:
    """Take the time of a look-up."""
    return 1e-5


def modelled(tokens: int, given: int = 0) -> float:
    """Take the time of a draft model half as slow as the CPU's."""
    return 0.05 * tokens


class Game:
    """Answers of a simulated model."""

    def __init__(
        self,
        verify: Seconds,
        draft: Seconds,
        accepts: Callable[[int, int], bool],
        most: int = 16,
        control: Adaptive | None = None,
        noise: float = 0.0,
    ) -> None:
        self.verify, self.draft, self.accepts, self.most, self.noise = verify, draft, accepts, most, noise
        self.control = control or Adaptive()
        self.chance = random.Random(3)
        self.given = 0
        self.seconds = self.plain = 0.0
        self.sizes: list[int] = []

    def play(self, tokens: int) -> Game:
        """Give tokens out."""
        end = self.given + tokens
        while self.given < end:
            size = self.control.budget(0, min(self.most, end - self.given))
            self.sizes.append(size)
            accepted, spent = 0, 0.0
            if size:
                while accepted < size and self.accepts(self.given, accepted):
                    accepted += 1
                spent = self.draft(size, self.given) * self.factor()
                self.control.drafting(size, spent)
            forward = self.verify(1 + size, self.given) * self.factor()
            self.control.cost(1 + size, forward)
            self.control.record(0, size, accepted, size)
            self.plain += (1 + accepted) * self.verify(1, self.given) * (1.0 + self.noise / 2)
            self.seconds += spent + forward
            self.given += 1 + accepted
        return self

    def factor(self) -> float:
        return 1.0 + self.noise * self.chance.random()

    @property
    def speedup(self) -> float:
        return self.plain / self.seconds


def flip(alpha: float, seed: int = 0) -> Callable[[int, int], bool]:
    """Accept each token with the same chance."""
    chance = random.Random(seed)
    return lambda given, place: chance.random() < alpha


PLACES: list[tuple[Seconds, Seconds]] = [
    (processor, found),
    (processor, modelled),
    (device, found),
    (device, lambda tokens, given: 0.01 * tokens),
    (busy, found),
    (busy, modelled),
    (busy, lambda tokens, given: 0.1 * tokens),
]


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("place", range(len(PLACES)))
def test_a_drafter_that_is_never_right_costs_under_three_percent(place: int, noise: float) -> None:
    game = Game(*PLACES[place], lambda given, place: False, noise=noise).play(2000)
    assert game.speedup > 0.97


@pytest.mark.parametrize("place", range(len(PLACES)))
def test_neither_does_one_that_is_right_in_probes_only(place: int) -> None:
    game: Game

    def spiteful(given: int, at: int) -> bool:
        return game.sizes[-1] == 1 and game.sizes[-2:-1] == [0]

    game = Game(*PLACES[place], spiteful)
    assert game.play(2000).speedup > 0.97

    def seldom(given: int, at: int) -> bool:
        return game.sizes[-1] == 1

    game = Game(*PLACES[place], seldom)
    assert game.play(2000).speedup > 0.97


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.3, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("place", range(len(PLACES)))
def test_nor_one_of_any_quality(place: int, alpha: float) -> None:
    assert Game(*PLACES[place], flip(alpha), noise=0.1).play(2000).speedup > 0.97


@pytest.mark.parametrize("most", [3, 8, 16, 40])
@pytest.mark.parametrize("verify", [processor, device])
def test_a_drafter_that_is_always_right_reaches_the_best_size(verify: Seconds, most: int) -> None:
    game = Game(verify, found, lambda given, place: True, most=most).play(200 * most)
    table = goodput_table(1.0, 1e-5 / verify(1, 0), [verify(1 + k, 0) / verify(1, 0) for k in range(most + 1)])
    size = Counter(game.sizes).most_common(1)[0][0]
    assert best(table).length == most
    assert size == most or table[size].speedup > best(table).speedup / Adaptive.MARGIN
    assert game.sizes.index(size) < 30
    assert game.speedup > 0.9 * best(table).speedup


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_it_comes_near_the_best_size(place: int, alpha: float) -> None:
    verify, draft = PLACES[place]
    one = verify(1, 0)
    wanted = max(
        sum(alpha**i for i in range(k + 1)) * one / (verify(1 + k, 0) + (draft(k, 0) if k else 0.0)) for k in range(17)
    )
    speedups = [Game(verify, draft, flip(alpha, seed)).play(2000).speedup for seed in range(5)]
    assert sum(speedups) / 5 > 0.93 * wanted


def test_it_notices_that_the_drafter_becomes_right() -> None:
    game = Game(processor, found, lambda given, place: given > 1000).play(1000)
    assert game.sizes[-1] == 0
    before = len(game.sizes)
    game.play(4000)
    assert game.sizes[-10] == 16
    assert next(turn for turn, size in enumerate(game.sizes[before:]) if size == 16) < Adaptive.SELDOM + 60


def test_it_notices_that_the_drafter_becomes_wrong() -> None:
    game = Game(processor, found, lambda given, place: given < 1000).play(1000)
    assert game.speedup > 3.0
    spent, due = game.seconds, game.plain
    game.play(1500)
    assert (game.plain - due) / (game.seconds - spent) > 0.93
    assert set(game.sizes[-100:]) <= {0, 1}


def test_it_notices_that_rows_become_dear() -> None:
    game = Game(lambda rows, given: device(rows) if given < 1000 else busy(rows), found, flip(0.7)).play(1000)
    assert Counter(game.sizes).most_common(1)[0][0] >= 8
    spent, due = game.seconds, game.plain
    game.play(2000)
    assert (game.plain - due) / (game.seconds - spent) > 0.93
    assert Counter(game.sizes[-200:]).most_common(1)[0][0] == 0


def test_it_notices_that_longer_drafts_become_right() -> None:
    def accepts(given: int, place: int) -> bool:
        return place < 1 or given > 1500

    game = Game(processor, found, accepts).play(1500)
    assert Counter(game.sizes[-50:]).most_common(1)[0][0] == 1
    before = len(game.sizes)
    game.play(1500)
    assert next(turn for turn, size in enumerate(game.sizes[before:]) if size == 16) < 3 * Adaptive.REFRESH


def test_a_machine_that_slows_down_as_a_whole_changes_nothing() -> None:
    def slowing(rows: int, given: int) -> float:
        return device(rows) * (1.0 + given / 500)

    game = Game(slowing, found, flip(0.8)).play(3000)
    assert game.sizes[40:].count(0) < 0.05 * len(game.sizes)
    assert game.speedup > 3.5


def test_preparations_of_the_first_rounds_do_not_condemn() -> None:
    seen: set[int] = set()

    def prepared(rows: int, given: int) -> float:
        slow = 100.0 if rows not in seen else 1.0
        seen.add(rows)
        return slow * device(rows)

    drafts: set[int] = set()

    def looked_up(tokens: int, given: int) -> float:
        slow = not drafts
        drafts.add(tokens)
        return 1.0 if slow else 1e-5

    game = Game(prepared, looked_up, flip(0.9)).play(1000)
    assert Counter(game.sizes).most_common(1)[0][0] >= 12
    assert game.sizes.count(0) < 10


def test_it_knows_the_costs_in_the_next_call() -> None:
    game = Game(device, found, lambda given, place: True).play(200)
    later = Game(device, found, lambda given, place: True, control=game.control).play(200)
    assert later.sizes[0] == 16


def test_the_end_of_an_answer_is_not_taken_for_the_limit() -> None:
    control = Adaptive()
    for _ in range(30):
        Game(device, found, lambda given, place: True, control=control).play(60)
    assert control.budget(0, 16) == 16
    assert control.budget(0, 3) == 3
    assert control.budget(0, 0) == 0


def test_the_same_measurements_give_the_same_decisions() -> None:
    first, second = (Game(processor, found, flip(0.6), noise=0.3).play(1000).sizes for _ in range(2))
    assert first == second


def test_empty_drafts_cost_nothing_and_do_not_condemn() -> None:
    control, sizes, drafted = Adaptive(), [], 0
    for turn in range(2000):
        size = control.budget(0, 10)
        sizes.append(size)
        made = min(size, 10) if turn % 6 == 0 else 0
        drafted += made > 0
        if size:
            control.drafting(made, 1e-5)
        control.cost(1 + made, processor(1 + made))
        control.record(0, made, made, made)
    assert drafted > 0.9 * 2000 / 6
    assert Counter(sizes).most_common(1)[0][0] == 10


def test_nodes_of_a_tree_count_by_their_place() -> None:
    def reach(path_of: Callable[[int], list[int]]) -> int:
        control, sizes = Adaptive(), []
        for _ in range(400):
            size = control.budget(0, 24)
            sizes.append(size)
            path = [node for node in path_of(size) if node <= size]
            if size:
                control.drafting(size, 1e-5)
            control.cost(1 + size, processor(1 + size))
            control.record(0, size, len(path), min(size, 3), path)
        return Counter(sizes).most_common(1)[0][0]

    assert reach(lambda size: [1]) == 1
    assert reach(lambda size: [1, 2, 3]) in (3, 4)
    # Only the fifth node is ever right: fewer are of no use.
    assert reach(lambda size: [5]) in (0, 5, 6)


def test_a_tree_without_paths_is_judged_by_its_levels() -> None:
    control, sizes = Adaptive(), []
    for _ in range(400):
        size = control.budget(0, 24)
        sizes.append(size)
        depth = min(3, size)
        control.drafting(size, 1e-5)
        control.cost(1 + size, device(1 + size))
        control.record(0, size, depth, depth)
    assert sizes[-1] >= 3


def test_rows_that_are_not_asked_say_nothing() -> None:
    control = Adaptive()
    for _ in range(60):
        size = control.budget(0, 8)
        control.drafting(size, 1e-5)
        control.cost(1 + size, device(1 + size))
        control.record(0, size, size, size)
        control.record(1, 0, 0, 0)
    assert control.budget(0, 8) == 8


def test_rows_of_a_batch_get_the_same_and_are_judged_together() -> None:
    control = Adaptive()
    for _ in range(100):
        sizes = [control.budget(row, 8) for row in range(3)]
        assert len(set(sizes)) == 1
        size = sizes[0]
        control.drafting(size, 1e-5)
        for row in range(3):
            control.record(row, size, 0, size)
        control.cost(1 + size, busy(1 + size))
    assert control.budget(0, 8) == 0


def test_short_and_long_matches_are_judged_apart() -> None:
    control, long, short = Adaptive(), 0, 0
    for turn in range(600):
        hint = 6 if turn % 2 else 2
        size = control.budget(0, 8, match_hint=hint)
        accepted = size if hint == 6 else 0
        control.drafting(size, 1e-5)
        control.cost(1 + size, processor(1 + size))
        control.record(0, size, accepted, size)
        if hint == 6:
            long = size
        else:
            short = size
    assert (long, short) == (8, 0)


def test_off_can_be_forbidden() -> None:
    game = Game(busy, found, lambda given, place: False, control=Adaptive(off=False)).play(300)
    assert game.sizes.count(0) < 20
    assert game.sizes[-10] == 1


@pytest.mark.parametrize("start", [0, True, 1.0, -3])
def test_refuses(start: Any) -> None:
    with pytest.raises(ValueError, match="start"):
        Adaptive(start=start)


def test_a_curve_withstands_outliers_never_falls_and_is_continued() -> None:
    curve = Curve()
    assert curve.at(3) == 0.0
    for turn in range(5):
        curve.add(1, 1.0 if turn else 50.0, turn)
        curve.add(5, 2.0, turn)
    assert curve.at(1) == 1.0
    assert curve.at(3) == pytest.approx(1.5)
    assert curve.at(9) == pytest.approx(3.0)
    assert curve.at(0) == 1.0
    for turn in range(5):
        curve.add(3, 3.0, turn)
    assert curve.at(3) == curve.at(5) == pytest.approx(2.5)
    values = [curve.at(size / 2) for size in range(30)]
    assert values == sorted(values)


def test_a_curve_forgets_what_is_old_but_not_all() -> None:
    curve = Curve(origin=True)
    curve.add(4, 2.0, 0)
    assert curve.at(2) == pytest.approx(1.0)
    curve.forget(100)
    assert curve.at(4) == 2.0
    curve.add(1, 1.0, 200)
    curve.forget(100)
    assert curve.at(4) == pytest.approx(4.0)


def test_the_plain_rules() -> None:
    assert stop_length([], 0.5) == 0
    assert stop_length([0.1, 0.1, 0.1], 0.5, (1, 20)) == 2
    assert stop_length([0.9] * 9, 0.99, (2, 4)) == 4
    assert best(goodput_table(0.0, 0.0, [1.0, 1.0, 1.0])).length == 0
    assert best(goodput_table(1.0, 0.0, [1.0, 2.0, 3.0])).length == 0
    assert [heuristic_length(1, 0), heuristic_length(3, 3), heuristic_length(3, 2, 2)] == [1, 5, 5]
