"""Counts, schedules and cost predictions."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfast.budget import (
    LanguageShape,
    average_of,
    check_keep,
    count,
    resolve_layer,
    shares,
    solve_average,
    truncated_count,
)

LLAVA_7B = LanguageShape(32, 4096, 11008, 32, 32, 128)
fractions = st.floats(min_value=1e-6, max_value=1.0, allow_nan=False)
counts = st.integers(min_value=1, max_value=100_000)


@pytest.mark.parametrize(
    ("keep", "error"),
    [
        (0, "keep=0 must be at least 1"),
        (-3, "keep=-3 must be at least 1"),
        (1.5, "keep=1.5 must lie in (0, 1]"),
        (0.0, "keep=0.0 must lie in (0, 1]"),
        (math.nan, "must lie in (0, 1]"),
        (math.inf, "must lie in (0, 1]"),
    ],
)
def test_illegal_values_name_the_field_and_the_range(keep: float, error: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_keep(keep)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [True, False, "64", None, [1]])
def test_other_types_are_refused(keep: object) -> None:
    with pytest.raises(TypeError, match=r"1 is one token and 1\.0 is all"):
        check_keep(keep)


@given(keep=st.one_of(fractions, counts), total=st.integers(1, 50_000))
def test_count_stays_in_range_and_is_monotone(keep: float, total: int) -> None:
    kept = count(keep, total)
    assert 1 <= kept <= total
    assert count(1.0, total) == total
    if isinstance(keep, int):
        assert kept == min(keep, total)
    else:
        assert abs(kept - keep * total) <= 0.5 or kept == 1
        assert truncated_count(keep, total) <= max(kept, 1)


profiles = st.lists(st.floats(0.001, 0.99), min_size=1, max_size=6).map(lambda values: sorted(values, reverse=True))


@given(profile=profiles, keep=fractions)
def test_a_solved_schedule_reaches_its_average_or_the_least(profile: list[float], keep: float) -> None:
    layers, depth = [2 + 3 * step for step in range(len(profile))], 20
    solved = solve_average(keep, profile, layers, depth)
    assert all(before >= after for before, after in itertools.pairwise(solved))
    reached = average_of(solved, layers, depth)
    assert reached == pytest.approx(max(keep, layers[0] / depth), abs=1e-3)


@given(total=st.integers(0, 5000), weights=st.lists(st.integers(0, 900), min_size=1, max_size=9))
def test_shares_add_up_and_are_proportional(total: int, weights: list[int]) -> None:
    parts = shares(total, weights)
    assert sum(parts) == (total if sum(weights) else 0)
    if sum(weights):
        assert all(abs(part - total * weight / sum(weights)) < 1 for part, weight in zip(parts, weights, strict=True))


@pytest.mark.parametrize(("layer", "depth"), [(0, 4), (4, 4), (1.0, 4), (7, 4)])
def test_layers_outside_the_model_are_refused(layer: float, depth: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in 1\.\.3"):
        resolve_layer(layer, depth)


def test_grouped_query_attention_is_cheaper() -> None:
    grouped = LanguageShape(32, 4096, 11008, 32, 8, 128)
    assert grouped.layer_flops(576) == LLAVA_7B.layer_flops(576) - 2 * 576 * 4096 * (32 - 8) * 128
    assert grouped.kv_bytes([576] * 32) * 4 == LLAVA_7B.kv_bytes([576] * 32)
