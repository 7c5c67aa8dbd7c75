"""The table of a folder of results: its intervals, and runs that have no question in common."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmfast.eval import summarize
from mmfast.eval.datasets import task
from mmfast.eval.runner import task_options
from mmfast.eval.statistics import cluster_bootstrap
from support.result_files import records, write


def test_a_question_drawn_twice_counts_twice_where_rotations_are_judged_together(tmp_path: Path) -> None:
    asked = task("mmbench", tmp_path)
    # Sixty questions in four rotations; of one of them a single rotation is wrong, which makes all of it wrong.
    right = [1.0] * 40 + [0.0] * 20
    scores = [score for score in right for _ in range(4)]
    scores[160:163] = [1.0] * 3
    found = [
        replace(record, task="mmbench", question_id=str(number // 4 + number % 4 * 10**6), cluster=str(number // 4))
        for number, record in enumerate(records(scores, choices=tuple("abcd")))
    ]
    write(tmp_path / "out", "full", found, task="mmbench", task_options=task_options(asked), chance=asked.chance)
    (row,) = summarize([tmp_path / "out"]).rows
    expected = cluster_bootstrap(right, list(range(60)), resamples=300).scaled(100)
    assert abs(row.score - 100 * 40 / 60) < 1e-9
    assert (row.interval.low, row.interval.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert row.interval.high - row.interval.low > 20


def test_runs_without_a_common_question_are_not_compared(tmp_path: Path) -> None:
    plan, baseline = "divprune(keep=64)", "uniform(keep=64)"
    write(tmp_path, plan, records([1, 0, 1], tokens=64))
    others = [replace(record, question_id=f"other{n}") for n, record in enumerate(records([1, 1, 1], tokens=64))]
    write(tmp_path, baseline, others)
    table = summarize([tmp_path])
    assert [row.plan for row in table.rows] == [plan, baseline]
    assert table.comparisons == ()
    assert f"mine: {plan} and {baseline} share no question" in table.notes
