"""Counts, schedules and cost predictions."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfast.budget import (
    LanguageShape,
    check_keep,
    count,
    geometric_for_average,
    geometric_fractions,
    prefill_flops,
    resolve_layer,
    truncated_count,
)
from mmfast.registry import get

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


@given(keep=fractions, steps=st.integers(1, 6))
def test_geometric_fractions_fall_and_end_at_keep(keep: float, steps: int) -> None:
    schedule = geometric_fractions(keep, steps)
    assert len(schedule) == steps
    assert schedule[-1] == keep
    assert all(before >= after - 1e-9 for before, after in itertools.pairwise(schedule))


@given(average=st.floats(0.27, 1.0))
def test_average_schedule_reaches_its_average(average: float) -> None:
    layers, depth = [8, 16, 24], 32
    schedule = geometric_for_average(average, layers, depth)
    reached = (8 + 8 * sum(schedule)) / depth
    assert reached == pytest.approx(average, abs=1e-6)


def test_an_average_below_the_first_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must exceed 0\.250"):
        geometric_for_average(0.2, [8, 16, 24], 32)


@pytest.mark.parametrize(("layer", "depth"), [(0, 4), (4, 4), (1.0, 4), (7, 4)])
def test_layers_outside_the_model_are_refused(layer: float, depth: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in 1\.\.3"):
        resolve_layer(layer, depth)


@pytest.mark.parametrize(
    ("plan", "teraflops"),
    [
        (None, 3.817),
        ("fastv(layer=2, keep=0.5)", 2.007),
        ("fastv(layer=2, keep=0.25)", 1.118),
        ("fastv(layer=3, keep=0.5)", 2.068),
        ("fastv(layer=5, keep=0.5)", 2.188),
        ("pyramiddrop()", 1.777),
    ],
)
def test_flops_reproduce_published_figures(plan: str | None, teraflops: float) -> None:
    """Visual tokens only, LLaVA-1.5-7B, as the papers count them."""
    if plan is None:
        layers = [576] * 32
    else:
        name, options = plan.split("(", 1)
        method = get(name).method(**dict(_option(text) for text in options[:-1].split(", ") if text))
        layers = method.tokens_per_layer(576, 0, 32)
    assert prefill_flops(LLAVA_7B, layers) / 1e12 == pytest.approx(teraflops, abs=6e-4)


def _option(text: str) -> tuple[str, float]:
    name, value = text.split("=")
    return name, float(value) if "." in value else int(value)


def test_grouped_query_attention_is_cheaper() -> None:
    grouped = LanguageShape(32, 4096, 11008, 32, 8, 128)
    assert grouped.layer_flops(576) == LLAVA_7B.layer_flops(576) - 2 * 576 * 4096 * (32 - 8) * 128
    assert grouped.kv_bytes([576] * 32) * 4 == LLAVA_7B.kv_bytes([576] * 32)
