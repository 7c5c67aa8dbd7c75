"""Things in turn: order, warm-up, ratios, what cannot run."""

from __future__ import annotations

import time

import pytest
import torch

from mmfast.bench.timing import Clock, Spread, interleaved, ratios


def test_sides_take_turns_and_warm_up_does_not_count() -> None:
    order: list[str] = []
    count = iter(range(100))

    def side(name: str) -> int:
        order.append(name)
        return next(count)

    found, left_out = interleaved({"a": lambda: side("a"), "b": lambda: side("b")}, repeats=3, seconds=10.0, warm_ups=2)
    assert "".join(order) == "aabb" + "ab" * 3
    assert found == {"a": [4, 6, 8], "b": [5, 7, 9]}
    assert left_out == {}


def test_one_that_cannot_run_spoils_no_other() -> None:
    def broken() -> int:
        raise ValueError("no such\nthing")

    found, left_out = interleaved({"broken": broken, "works": lambda: 1}, repeats=2, seconds=1.0)
    assert found == {"works": [1, 1]}
    assert left_out == {"broken": "ValueError: no such thing"}


def test_what_takes_long_is_run_less_often() -> None:
    found, _ = interleaved({"slow": lambda: time.sleep(0.02)}, repeats=50, seconds=0.05)
    assert 1 <= len(found["slow"]) <= 2


@pytest.mark.parametrize("name", ["repeats", "warm_ups"])
def test_bad_counts_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        interleaved({}, **({"repeats": 1, "seconds": 1.0} | {name: 0}))


def test_ratios_are_taken_round_by_round() -> None:
    # The machine became three times slower half-way; the ratio of medians would be 2 / 3 instead of 2.
    assert ratios([2.0, 2.0, 6.0], [1.0, 1.0, 3.0]) == Spread(2.0, 2.0, 2.0, 3)


def test_a_single_value_has_no_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 1)


def test_the_clock_of_a_cpu_does_not_count_waiting() -> None:
    clock = Clock(torch.device("cpu"))
    assert clock.cost(lambda: time.sleep(0.05)) < 0.03
    assert clock.sample(lambda: sum(range(2000)))[0] < 1e-3
