"""The table of an evaluation, from its files alone: a resumed or merged run gives the same one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import mmfast
from mmfast.eval.baselines import DOWNSAMPLING, NAMES, baseline_name
from mmfast.eval.datasets import TASKS
from mmfast.eval.datasets import task as build_task
from mmfast.eval.records import Header, Record, Run
from mmfast.eval.results import merge
from mmfast.eval.runner import task_options
from mmfast.eval.statistics import Difference, Interval, above_chance, bootstrap_of, interval_of, paired
from mmfast.eval.task import Task

_MEANS = (
    "n_visual_in",
    "n_visual_kept",
    "n_visual_layer_average",
    "prefill_macs",
    "prefill_flops",
    "full_prefill_macs",
    "kv_bytes",
    "full_kv_bytes",
    "tokens_per_forward",
)
_MEDIANS = ("preprocess_ms", "encoder_ms", "reduce_ms", "prefill_ms", "ttft_ms", "decode_tok_s", "e2e_ms")
_MOSTS = ("peak_memory_bytes", "peak_above_weights_bytes")

# Baselines on a grid may leave fewer tokens than they were given.
_MATCHED = 0.25
_NEARLY = 0.05


@dataclass(frozen=True)
class Row:
    """One plan on one task.

    Attributes:
        task: name of the task.
        model: name of the model.
        plan: the plan in text form; the seeds of the random baseline are one row.
        baseline: ``"full"``, ``"random"``, ``"uniform"``, ``"pool2d"``, ``"downsample"``, or "" for other plans.
        seeds: runs in this row.
        n: questions.
        failed: of these, how many failed and count as wrong.
        metric: the headline.
        score: its value, in the task's own scale, mostly percent.
        interval: of the score, 95 %.
        figures: everything else that the task's summary says; of one seed.
        relative: score over that of the full model.
        above_chance: the same above blind guessing.
        hard_score: percent right of the questions that the full model has right and down-sampling to as many tokens
            has wrong; None where there are none, or no such baseline.
        hard_n: how many these are.
        costs: means of tokens, MACs, FLOPs and bytes, medians of times and rates, most of peak memory, each with the
            name it has in a record; ``kept_min``, ``kept_max`` and ``ttft_iqr_ms`` besides. None: not measured.
    """

    task: str
    model: str
    plan: str
    baseline: str
    seeds: int
    n: int
    failed: int
    metric: str
    score: float
    interval: Interval
    figures: dict[str, float]
    relative: float | None
    above_chance: float | None
    hard_score: float | None
    hard_n: int
    costs: dict[str, float | None]


@dataclass(frozen=True)
class Versus:
    """A plan against a baseline, question by question.

    Attributes:
        task: name of the task.
        model: name of the model.
        plan: the plan.
        other: the baseline.
        difference: mean score of the plan minus that of the baseline, in points of 100.
    """

    task: str
    model: str
    plan: str
    other: str
    difference: Difference


@dataclass(frozen=True)
class Table:
    """The summary of an evaluation; ``str()`` of it is a text for the terminal.

    Attributes:
        rows: one per task, model and plan.
        comparisons: every plan against the baselines of its token budget.
        notes: what the reader should know of these figures, a sentence each.
    """

    rows: tuple[Row, ...]
    comparisons: tuple[Versus, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        from mmfast.eval.table_text import table_text

        return table_text(self)


class _Entry:
    """The runs of one row."""

    def __init__(self, plan: str, baseline: str, runs: Sequence[Run], task: Task) -> None:
        self.plan, self.baseline, self.runs, self.task = plan, baseline, runs, task
        self.header = runs[0].header
        self.records = [record for run in runs for record in run.records]

    @cached_property
    def scores(self) -> dict[str, float]:
        """Score of each question, averaged over the seeds."""
        found: dict[str, list[float]] = {}
        for record in self.records:
            found.setdefault(record.question_id, []).append(record.score)
        return {name: fmean(values) for name, values in found.items()}

    @cached_property
    def clusters(self) -> dict[str, str]:
        """Cluster of each question; its own id where it has none."""
        return {record.question_id: record.cluster or record.question_id for record in self.records}

    @cached_property
    def tokens(self) -> float | None:
        """Visual tokens per layer and question."""
        return _mean(self.records, "n_visual_layer_average")

    @cached_property
    def figures(self) -> dict[str, float]:
        """What the task says of the first run."""
        return self.task.summary([record.outcome() for record in self.runs[0].records])

    @cached_property
    def headline(self) -> float:
        """The task's headline, averaged over the seeds."""
        return fmean(_headline(self.task, run.records) for run in self.runs)

    def interval(self) -> Interval:
        """Return the interval of the headline, from whole clusters where questions share one."""
        names = list(self.scores)
        scores = [self.scores[name] for name in names]
        clusters = grouped([self.clusters[name] for name in names])
        if abs(100 * fmean(scores) - self.headline) < 1e-6:
            return interval_of(scores, clusters).scaled(100)
        runs = [{record.question_id: record for record in run.records} for run in self.runs]

        def figure(drawn: Sequence[Sequence[int]]) -> float:
            # A cluster drawn twice is two: tasks that judge whole clusters would take both for one.
            picked = [
                [
                    replace(run[names[i]], cluster=f"{run[names[i]].cluster}#{turn}")
                    for turn, members in enumerate(drawn)
                    for i in members
                    if names[i] in run
                ]
                for run in runs
            ]
            return fmean(_headline(self.task, records) for records in picked if records)

        return bootstrap_of(figure, len(names), clusters)


def summarize(paths: Iterable[Path], *, tasks: Sequence[Task] = ()) -> Table:
    """Make the table of result files.

    Args:
        paths: files, and folders whose files are taken, of any number of shards.
        tasks: tasks of your own, which no name leads to; their summary is used.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if a file cannot be read, or files do not fit together.
    """
    settings: dict[tuple[Any, ...], list[Run]] = {}
    notes: list[str] = []
    for run in merge(paths):
        if run.records:
            settings.setdefault(run.header.setting, []).append(run)
    rows: list[Row] = []
    comparisons: list[Versus] = []
    for runs in settings.values():
        entries = _entries(runs, _task_of(runs[0].header, tasks, notes))
        full = next((entry for entry in entries if entry.baseline == "full"), None)
        apart: dict[str, list[_Entry]] = {}
        for entry in entries:
            matched = {} if entry.baseline == "full" else matching(entry, entries)
            rows.append(_row(entry, full, next((matched[name] for name in DOWNSAMPLING if name in matched), None)))
            if not entry.baseline:
                others = [*([full] if full else []), *matched.values()]
                for other in others:
                    if entry.scores.keys() & other.scores.keys():
                        comparisons.append(_versus(entry, other))
                    else:
                        notes.append(f"{entry.header.task}: {entry.plan} and {other.plan} share no question")
                for other in matched.values():
                    if _apart(entry, other):
                        apart.setdefault(other.plan, []).append(entry)
        notes += [_token_note(plan, plans, entries) for plan, plans in apart.items()]
        notes += _setting_notes(entries)
    return Table(tuple(rows), tuple(comparisons), tuple(dict.fromkeys(notes)))


def matching(entry: _Entry, entries: Sequence[_Entry]) -> dict[str, _Entry]:
    """Return for each baseline the run with nearly as many visual tokens per layer."""
    found: dict[str, _Entry] = {}
    for name in NAMES:
        near = [
            (abs(other.tokens - entry.tokens), other)
            for other in entries
            if other.baseline == name and other is not entry and entry.tokens and other.tokens
        ]
        if near:
            distance, other = min(near, key=lambda pair: pair[0])
            if entry.tokens and distance <= _MATCHED * entry.tokens:
                found[name] = other
    return found


def grouped(clusters: list[str]) -> list[str] | None:
    """Return the clusters, or None where every question is one of its own."""
    return clusters if len(set(clusters)) < len(clusters) else None


def _entries(runs: Sequence[Run], task: Task) -> list[_Entry]:
    """Make a row of every plan, and one of all seeds of a random baseline; the full model first, baselines last."""
    pooled: dict[str, list[Run]] = {}
    names: dict[str, str] = {}
    for run in runs:
        baseline = baseline_name(run.header.plan)
        plan = run.header.plan
        if baseline == "random":
            method = mmfast.Plan.of(plan).methods[0]
            plan = mmfast.Plan((type(method)(**{**method.options(), "seed": 0}),)).to_text()
        pooled.setdefault(plan, []).append(run)
        names[plan] = baseline
    order = ["full", "", *NAMES]
    entries = [_Entry(plan, names[plan], pooled[plan], task) for plan in pooled]
    return sorted(entries, key=lambda entry: (order.index(entry.baseline), -(entry.tokens or 0), entry.plan))


def _task_of(header: Header, tasks: Sequence[Task], notes: list[str]) -> Task:
    for task in tasks:
        if task.name == header.task and task_options(task) == header.task_options:
            return task
    if header.task in TASKS:
        return build_task(header.task, **{k: v for k, v in header.task_options.items() if v is not None})
    notes.append(f"no task {header.task!r} is known here: its headline is the mean score; pass it in tasks=")
    return _Unknown()


class _Unknown(Task):
    """Stands for a task of which there are only records: the mean score is its summary."""

    name, media = "unknown", "text"

    def samples(self) -> Any:
        """Yield nothing."""
        return iter(())

    def score(self, sample: Any, prediction: str) -> Any:
        """Score nothing: records hold their score."""
        raise TypeError("a task of which there are only records cannot score")


def _headline(task: Task, records: Sequence[Record]) -> float:
    return next(iter(task.summary([record.outcome() for record in records]).values()))


def _row(entry: _Entry, full: _Entry | None, down: _Entry | None) -> Row:
    header, score = entry.header, entry.headline
    hard_score, hard_n = _hard(entry, full, down)
    return Row(
        task=header.task,
        model=header.model,
        plan=entry.plan,
        baseline=entry.baseline,
        seeds=len(entry.runs),
        n=len(entry.scores),
        failed=sum(bool(record.error) for record in entry.records),
        metric=header.metric,
        score=score,
        interval=entry.interval(),
        figures=entry.figures,
        relative=score / full.headline if full and full.headline else None,
        above_chance=above_chance(score, full.headline, header.chance) if full else None,
        hard_score=hard_score,
        hard_n=hard_n,
        costs=_costs(entry.records),
    )


def _hard(entry: _Entry, full: _Entry | None, down: _Entry | None) -> tuple[float | None, int]:
    """Score the questions that need the tokens: right with all of them, wrong after down-sampling."""
    if full is None or down is None:
        return None, 0
    common = entry.scores.keys() & full.scores.keys() & down.scores.keys()
    hard = [name for name in common if full.scores[name] >= 0.5 > down.scores[name]]
    return (100 * fmean(entry.scores[name] for name in hard) if hard else None), len(hard)


def _versus(entry: _Entry, other: _Entry) -> Versus:
    names = [name for name in entry.scores if name in other.scores]
    clusters = grouped([entry.clusters[name] for name in names])
    found = paired([entry.scores[name] for name in names], [other.scores[name] for name in names], clusters)
    points = Difference(
        100 * found.mean, found.interval and found.interval.scaled(100), found.p_bootstrap, found.p_mcnemar, found.n
    )
    return Versus(entry.header.task, entry.header.model, entry.plan, other.plan, points)


def _costs(records: Sequence[Record]) -> dict[str, float | None]:
    found = {name: _mean(records, name) for name in _MEANS}
    spread: list[float] = []
    for name in _MEDIANS:
        values = _values(records, name)
        cuts = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        found[name] = cuts[1] if cuts else None
        if name == "ttft_ms" and cuts:
            spread = [cuts[2] - cuts[0]]
    for name in _MOSTS:
        found[name] = max(_values(records, name), default=None)
    kept = _values(records, "n_visual_kept")
    return found | {
        "kept_min": min(kept, default=None),
        "kept_max": max(kept, default=None),
        "ttft_iqr_ms": spread[0] if spread else None,
    }


def _values(records: Sequence[Record], name: str) -> list[float]:
    return [value for record in records if (value := getattr(record, name)) is not None]


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = _values(records, name)
    return fmean(values) if values else None


def _apart(entry: _Entry, other: _Entry) -> bool:
    """Say whether a baseline has not quite the tokens of a plan."""
    return bool(entry.tokens and other.tokens and abs(other.tokens - entry.tokens) > _NEARLY * entry.tokens)


def _token_note(baseline: str, plans: Sequence[_Entry], entries: Sequence[_Entry]) -> str:
    other = next(entry for entry in entries if entry.plan == baseline)
    listed = ", ".join(f"{entry.plan} {entry.tokens:.1f}" for entry in plans[:2])
    more = f" and {len(plans) - 2} more plans" if len(plans) > 2 else ""
    return (
        f"{other.header.task}: {baseline} leaves {other.tokens:.1f} visual tokens per layer, "
        f"the plans beside it {listed}{more}"
    )


def _setting_notes(entries: Sequence[_Entry]) -> list[str]:
    header = entries[0].header
    notes = []
    if len({len(entry.scores) for entry in entries}) > 1:
        notes.append(
            f"{header.task}: the plans have answered different numbers of questions; run it again to finish it"
        )
    machines = {str(sorted(found.items())) for entry in entries for run in entry.runs for found in run.hardware}
    if len(machines) > 1:
        notes.append(f"{header.task}: {len(machines)} different machines took part, so times cannot be compared")
    if header.batch > 1:
        notes.append(
            f"{header.task}: answered {header.batch} at once, so first tokens, decoding and memory are not measured"
        )
    return notes
