"""Intervals and tests against values worked out by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mmfast.eval.statistics import (
    MIN_CLUSTERS,
    Z95,
    above_chance,
    bootstrap_of,
    cluster_bootstrap,
    interval_of,
    mcnemar_exact,
    normal,
    paired,
    wilson,
)


def test_wilson_at_the_ends_is_the_closed_form() -> None:
    square = Z95 * Z95
    assert wilson(0, 10).low == 0.0
    assert wilson(0, 10).high == pytest.approx(square / (10 + square), rel=1e-12)
    assert wilson(10, 10).low == pytest.approx(10 / (10 + square), rel=1e-12)


def test_wilson_solves_the_score_equation() -> None:
    # Its ends are the shares p from which 30 of 40 lie exactly 1.96 standard errors away.
    found = wilson(30, 40)
    for p in (found.low, found.high):
        assert abs(0.75 - p) / np.sqrt(p * (1 - p) / 40) == pytest.approx(Z95, rel=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 4), (5, 4)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"successes={successes} of n={n}"):
        wilson(successes, n)


def test_normal_interval_of_a_share_is_the_textbook_one() -> None:
    scores = [1.0] * 60 + [0.0] * 40
    error = np.sqrt(0.6 * 0.4 / 99)
    assert normal(scores).high == pytest.approx(0.6 + Z95 * error, rel=1e-12)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(2, 8, 2 * (1 + 10 + 45) / 1024), (8, 2, 2 * 56 / 1024), (0, 6, 2 / 64), (3, 3, 1.0), (0, 0, 1.0)],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar_exact(only_first, only_second) == pytest.approx(p, rel=1e-12)


def test_mcnemar_survives_thousands_of_disagreements() -> None:
    assert 0 < mcnemar_exact(2400, 2600) < 0.01


def test_cluster_bootstrap_draws_whole_clusters_by_their_size() -> None:
    # Clusters {1, 1} and {0} only: 16 equally likely draws of four such clusters, weighted by their sizes.
    sums, sizes = np.array([2, 0, 2, 0]), np.array([2, 1, 2, 1])
    draws = [list(draw) for draw in product(range(4), repeat=4)]
    means = [sums[draw].sum() / sizes[draw].sum() for draw in draws]
    low, high = np.percentile(means, [2.5, 97.5])
    found = cluster_bootstrap([1, 1, 0, 1, 1, 0], list("aabccd"), resamples=20_000)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    drawn = bootstrap_of(
        lambda picked: float(np.mean([[1, 1, 0, 1, 1, 0][i] for members in picked for i in members])),
        6,
        list("aabccd"),
        resamples=4_000,
    )
    assert (drawn.low, drawn.high) == pytest.approx((low, high), abs=1e-9)


def test_copies_of_a_sample_in_its_cluster_add_no_certainty() -> None:
    scores = [1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1]
    names = list(range(len(scores)))
    once = cluster_bootstrap(scores, names)
    often = cluster_bootstrap([s for s in scores for _ in range(10)], [n for n in names for _ in range(10)])
    assert (once.low, once.high) == pytest.approx((often.low, often.high), abs=1e-12)


def test_interval_fits_the_scores() -> None:
    clusters = [i // 5 for i in range(5 * MIN_CLUSTERS)]
    mixed = [float(i % 2) for i in range(5 * MIN_CLUSTERS)]
    assert interval_of(mixed).method == "Wilson"
    assert interval_of([0.5, 0.25, 1.0]).method == "normal"
    assert interval_of(mixed, clusters).method == "cluster bootstrap"
    few = interval_of([1.0] * 20, [i // 10 for i in range(20)])
    assert (few.low, few.high) == pytest.approx((wilson(2, 2).low, 1.0))


def test_paired_comparison() -> None:
    first, second = [1.0] * 9 + [0.0] + [1.0] * 90, [0.0] * 9 + [1.0] + [1.0] * 90
    found = paired(first, second)
    assert found.mean == pytest.approx(0.08)
    assert found.p_mcnemar == pytest.approx(2 * 11 / 1024)
    assert found.interval is not None
    assert 0 < found.interval.low < 0.08 < found.interval.high
    assert found.p_bootstrap is not None
    assert found.p_bootstrap < 0.05
    swapped = paired(second, first)
    assert swapped.mean == -found.mean
    assert paired(first, first).p_bootstrap == 1.0


def test_paired_comparison_knows_its_clusters() -> None:
    # All of the gain is in three videos of twenty.
    clusters = [i // 10 for i in range(200)]
    first = [1.0 if c < 3 else 0.0 for c in clusters]
    alone, grouped = paired(first, [0.0] * 200), paired(first, [0.0] * 200, clusters)
    assert alone.interval is not None
    assert grouped.interval is not None
    assert grouped.interval.high - grouped.interval.low > 2 * (alone.interval.high - alone.interval.low)
    few = paired([1.0, 0.0, 1.0], [0.0, 0.0, 0.0], ["a", "a", "b"])
    assert (few.interval, few.p_bootstrap, few.p_mcnemar) == (None, None, 0.5)


def test_graded_scores_have_no_mcnemar() -> None:
    assert paired([0.3, 1.0], [0.0, 1.0]).p_mcnemar is None


def test_paired_comparison_needs_pairs() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="at least one score"):
        paired([], [])
    with pytest.raises(ValueError, match="one for each of the 2 scores, got 1"):
        cluster_bootstrap([1.0, 0.0], ["a"])


def test_above_chance() -> None:
    # 97 % relative on four choices at 57: 5 % of the signal is gone.
    assert above_chance(0.97 * 57, 57, 25) == pytest.approx(1 - 1.71 / 32)
    assert above_chance(30, 20, 25) is None
