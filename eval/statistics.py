"""How sure a figure is: intervals, paired tests and figures above chance, as pure functions.

Samples that share a picture or a video are correlated; where ``clusters`` are given, whole clusters are drawn
again and again, so that twenty questions about one video do not count as twenty videos.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
"""Half the width of a 95 % interval, in standard errors."""

RESAMPLES = 2000

MIN_CLUSTERS = 10
"""With fewer, drawing clusters again says little of how far they spread, and far too narrow intervals come out."""

_AT_ONCE = 100


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval.

    Attributes:
        low: its lower end.
        high: its upper end.
        method: how it was found, for the reader.
    """

    low: float
    high: float
    method: str

    def scaled(self, factor: float) -> Interval:
        """Return the same interval in another unit, for example in percent."""
        return Interval(factor * self.low, factor * self.high, self.method)


@dataclass(frozen=True)
class Difference:
    """A paired comparison of two runs over the same samples.

    Attributes:
        mean: mean score of the first minus that of the second.
        interval: of this difference; None with fewer than :data:`MIN_CLUSTERS` clusters.
        p_bootstrap: two-sided p-value of the paired bootstrap; None likewise.
        p_mcnemar: of McNemar's exact test; None where scores are not all right or wrong.
        n: samples compared.
    """

    mean: float
    interval: Interval | None
    p_bootstrap: float | None
    p_mcnemar: float | None
    n: int


def wilson(successes: float, n: int, z: float = Z95) -> Interval:
    """Return the Wilson interval of a share; unlike the normal one it has a width at 0 and 1.

    Args:
        successes: how many were right.
        n: out of how many, at least 1.
        z: standard errors to each side.

    Raises:
        ValueError: if ``n`` is below 1 or ``successes`` is outside 0..n.

    Example:
        >>> found = wilson(8, 10)
        >>> round(found.low, 4), round(found.high, 4)
        (0.4902, 0.9433)
        >>> round(wilson(10, 10).low, 4)
        0.7225
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes} of n={n}: n must be at least 1 and successes in 0..n")
    share, scale = successes / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(max(0.0, middle - half), min(1.0, middle + half), "Wilson")


def normal(scores: Sequence[float], z: float = Z95) -> Interval:
    """Return the normal interval of a mean: ``z`` times the standard error to each side.

    Raises:
        ValueError: if there are no scores.

    Example:
        >>> found = normal([0.0, 0.5, 1.0, 0.5])
        >>> round(found.low, 3), round(found.high, 3)
        (0.1, 0.9)
    """
    values = _array(scores)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    mean = float(values.mean())
    return Interval(mean - z * error, mean + z * error, "normal")


def cluster_bootstrap(
    scores: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the interval of a mean from clusters drawn with replacement (percentiles).

    Args:
        scores: one per sample.
        clusters: what each sample belongs to; None takes every sample for itself.
        resamples: how often to draw.
        seed: of the drawing.

    Raises:
        ValueError: if there are no scores, or the numbers of scores and clusters differ.

    Example:
        >>> alone = cluster_bootstrap([0, 1] * 50)
        >>> grouped = cluster_bootstrap([0] * 50 + [1] * 50, [i // 10 for i in range(100)])
        >>> grouped.high - grouped.low > 2 * (alone.high - alone.low)
        True
    """
    means = _resampled_means(_array(scores), clusters, resamples, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(low), float(high), "bootstrap" if clusters is None else "cluster bootstrap")


def bootstrap_of(
    figure: Callable[[Sequence[Sequence[int]]], float],
    n: int,
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = 300,
    seed: int = 0,
) -> Interval:
    """Return the interval of any figure of a set of samples, for metrics that are no mean.

    Args:
        figure: from the numbers of the samples in each cluster drawn, repetitions among them, to the figure.
        n: how many samples there are.
        clusters: what each sample belongs to; None takes every sample for itself.
        resamples: how often to draw.
        seed: of the drawing.

    Example:
        >>> scores = [0.0, 1.0, 1.0, 1.0]
        >>> bootstrap_of(lambda drawn: max(scores[i] for cluster in drawn for i in cluster), 4).high
        1.0
    """
    members = _members(range(n) if clusters is None else clusters)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = rng.integers(len(members), size=len(members))
        found.append(figure([members[cluster] for cluster in drawn]))
    low, high = np.percentile(found, [2.5, 97.5])
    return Interval(float(low), float(high), "bootstrap" if clusters is None else "cluster bootstrap")


def interval_of(scores: Sequence[float], clusters: Sequence[Hashable] | None = None, *, seed: int = 0) -> Interval:
    """Return the interval that fits the scores.

    Correlated samples get the cluster bootstrap, right-or-wrong scores the Wilson interval, others the normal one.
    Where clusters are few or every sample scores the same, resampling has nothing to say: then Wilson, as if every
    cluster were one sample.

    Raises:
        ValueError: if there are no scores.

    Example:
        >>> interval_of([1, 0, 1, 1]).method, interval_of([0.3, 0.9, 1.0]).method
        ('Wilson', 'normal')
        >>> interval_of([1, 0, 1] * 20, [i // 3 for i in range(60)]).method
        'Wilson over clusters'
        >>> interval_of([1, 0, 1] * 20, [i // 4 for i in range(60)]).method
        'cluster bootstrap'
    """
    values = _array(scores)
    groups = len(values) if clusters is None else len(set(clusters))
    if groups == len(values):
        return wilson(float(values.sum()), groups) if is_binary(scores) else normal(scores)
    if groups >= MIN_CLUSTERS:
        found = cluster_bootstrap(scores, clusters, seed=seed)
        if found.low < found.high:
            return found
    if values.min() < 0 or values.max() > 1:
        return normal(scores)
    found = wilson(float(values.mean()) * groups, groups)
    return Interval(found.low, found.high, "Wilson over clusters")


def is_binary(scores: Sequence[float]) -> bool:
    """Whether all scores are right or wrong, 1 or 0.

    Example:
        >>> is_binary([1.0, 0.0]), is_binary([0.3])
        (True, False)
    """
    return all(score in (0.0, 1.0) for score in scores)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Under the null hypothesis each sample on which two runs disagree is a fair coin.

    Args:
        only_first: samples that only the first run has right.
        only_second: samples that only the second run has right.

    Raises:
        ValueError: if a count is negative.

    Example:
        >>> mcnemar_exact(1, 9) == 2 * (1 + 10) / 2**10
        True
        >>> mcnemar_exact(0, 0), mcnemar_exact(4, 4)
        (1.0, 1.0)
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"only_first={only_first} and only_second={only_second} must not be negative")
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    # Whole numbers until the last division: 2**n is beyond a float for n > 1023.
    share: float = 2 * tail / 2**n
    return min(1.0, share)


def paired(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Compare two runs over the same samples, in the same order.

    McNemar's test takes samples for independent; the bootstrap does not where clusters are given.

    Args:
        first: scores of the first run.
        second: scores of the second run.
        clusters: what each sample belongs to; None takes every sample for itself.
        resamples: how often to draw.
        seed: of the drawing.

    Raises:
        ValueError: if the numbers of scores differ, or there are none.

    Example:
        >>> found = paired([1] * 9 + [0], [0] * 9 + [1])
        >>> found.mean, round(found.p_mcnemar, 4), found.interval.low > 0
        (0.8, 0.0215, True)
    """
    if len(first) != len(second):
        raise ValueError(f"a paired comparison needs equally many scores, got {len(first)} and {len(second)}")
    differences = _array(first) - _array(second)
    exact = None
    if is_binary(first) and is_binary(second):
        exact = mcnemar_exact(int((differences > 0).sum()), int((differences < 0).sum()))
    mean = float(differences.mean())
    if clusters is not None and len(set(clusters)) < MIN_CLUSTERS:
        return Difference(mean, None, None, exact, len(differences))
    means = _resampled_means(differences, clusters, resamples, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    # One is added to both counts: a p-value of zero would claim more than the draws can show.
    below, above = (int((means <= 0).sum()) + 1, int((means >= 0).sum()) + 1)
    method = "paired bootstrap" if clusters is None else "paired cluster bootstrap"
    p_value = min(1.0, 2 * min(below, above) / (resamples + 1))
    return Difference(mean, Interval(float(low), float(high), method), p_value, exact, len(differences))


def above_chance(score: float, full: float, floor: float) -> float | None:
    """Return which part of what the full model has above blind guessing is left; None where that is nothing.

    Example:
        >>> above_chance(55.0, 57.0, 25.0)
        0.9375
        >>> above_chance(25.0, 25.0, 25.0) is None
        True
    """
    return (score - floor) / (full - floor) if full > floor else None


def _array(scores: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError("there must be at least one score, got none")
    return values


def _members(clusters: Sequence[Hashable]) -> list[list[int]]:
    found: dict[Hashable, list[int]] = {}
    for index, cluster in enumerate(clusters):
        found.setdefault(cluster, []).append(index)
    return list(found.values())


def _resampled_means(
    values: NDArray[np.float64], clusters: Sequence[Hashable] | None, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return the means of ``resamples`` draws of whole clusters."""
    if clusters is not None and len(clusters) != len(values):
        raise ValueError(f"clusters must name one for each of the {len(values)} scores, got {len(clusters)}")
    members = _members(range(len(values)) if clusters is None else clusters)
    sums = np.array([values[indices].sum() for indices in members])
    counts = np.array([len(indices) for indices in members], dtype=np.float64)
    rng = np.random.default_rng(seed)
    found = []
    # A part at a time: all draws of a large data set at once would take hundreds of megabytes.
    for start in range(0, resamples, _AT_ONCE):
        drawn = rng.integers(len(members), size=(min(_AT_ONCE, resamples - start), len(members)))
        found.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(found)
