"""The page of an evaluation: table, charts, and every question that a plan lost or won, from results files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from mmfast.eval.charts import STYLE as CHART_STYLE
from mmfast.eval.charts import Point, marker, scatter
from mmfast.eval.differences import SCRIPT, differences
from mmfast.eval.differences import STYLE as DIFFERENCE_STYLE
from mmfast.eval.records import Run
from mmfast.eval.results import merge
from mmfast.eval.statistics import MIN_CLUSTERS
from mmfast.eval.summary import Row, Table, Versus, summarize
from mmfast.eval.table_text import ABSENT, chance, number, percent
from mmfast.eval.task import Task
from mmfast.page import document, facts, table

_LEVEL = 0.05
_STYLE = (
    CHART_STYLE
    + DIFFERENCE_STYLE
    + """
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: 0 0 1rem; }
.plans { font-size: .88rem; } .plans td { white-space: nowrap; overflow-wrap: normal; }
.plans th { overflow-wrap: normal; } .plans th:first-child, .plain th, .plain td { text-align: left; }
.plans td:first-child { text-align: left; white-space: normal; min-width: 10rem; overflow-wrap: break-word; }
.plans b { display: inline-block; min-width: 1.6rem; color: var(--soft); font-weight: 500; }
.plans code, .plain code { font-size: .95em; }
tr.baseline td { color: var(--soft); } .plain { font-size: .88rem; width: auto; }
.wide { overflow-x: auto; } summary { cursor: pointer; padding: .35rem 0; }
@media screen and (max-width: 50rem) { .plain { width: 100%; } }
@media print { .wide { overflow: visible; } .plans, .plans th { font-size: 7.5px; } .plans td { padding: .15rem; } }
"""
)


def write_report(path: Path, paths: Iterable[Path], *, found: Table | None = None, tasks: Sequence[Task] = ()) -> None:
    """Write the page of an evaluation.

    Args:
        path: the file, which is overwritten.
        paths: results files, and folders whose files are taken.
        found: their table, if it is there already.
        tasks: tasks of your own, which no name leads to.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if a file cannot be read, or there are no results.
    """
    sources = list(paths)
    content = page(found or summarize(sources, tasks=tasks), merge(sources))
    path.write_text(content, encoding="utf-8", errors="backslashreplace")


def page(found: Table, runs: Sequence[Run]) -> str:
    """Return the page of a table and of the runs it was made of.

    Raises:
        ValueError: if the table has no rows.
    """
    if not found.rows:
        raise ValueError("there are no results to show yet; run `mmfast eval` with this folder first")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in found.rows:
        groups.setdefault((row.task, row.model, row.metric), []).append(row)
    models = ", ".join(dict.fromkeys(row.model for row in found.rows))
    links = "".join(
        f'<a href="#part-{place}">{escape(task)}{f", {escape(model)}" if "," in models else ""}</a>'
        for place, (task, model, _) in enumerate(groups)
    )
    parts = "".join(
        _section(f"part-{place}", rows, found, [run for run in runs if _is_of(run, task, model)])
        for place, ((task, model, _), rows) in enumerate(groups.items())
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    body = f"""<header><h1>Evaluation of {escape(models)}</h1>{facts(_facts(runs))}</header>
{f'<nav class="screen">{links}</nav>' if len(groups) > 1 else ""}<main>{parts}
{f"<section><h2>Notes</h2><ul>{notes}</ul></section>" if notes else ""}
<p class="soft">Score: the headline of the task, small below it its 95 % interval. Of full: share of the full model's
score; above chance: the same above blind guessing. Hard: percent of the questions that the full model has right and
down-sampling to as many tokens has wrong. Tokens: visual tokens that enter the language model; per layer: the average
over its layers. TTFT: vision to first token, without preprocessing, median. GFLOP: prefill of the language model, two
per multiply-accumulate. Against full: points, paired over the same questions, by the bootstrap and, where scores are
right or wrong, McNemar's test; a difference is named where every p is below {_LEVEL}, not corrected for the number of
plans.</p>
</main>"""
    return document(f"mmfast eval: {models}", body, style=_STYLE, script=SCRIPT)


def _is_of(run: Run, task: str, model: str) -> bool:
    return (run.header.task, run.header.model) == (task, model)


def _facts(runs: Sequence[Run]) -> dict[str, str]:
    """Say what was run; what differs between runs is said with all its values."""
    headers = [run.header for run in runs]
    machines = [", ".join(f"{name} {value}" for name, value in found.items()) for run in runs for found in run.hardware]
    versions = [", ".join(f"{name} {value}" for name, value in header.versions.items()) for header in headers]
    asked = [
        "all"
        if header.limit is None
        else f"{header.limit} {'first' if header.seed is None else f'by lot, seed {header.seed}'}"
        for header in headers
    ]
    values = {
        "weights": [f"{header.weights} in {header.dtype}" for header in headers],
        "questions": asked,
        "answers": [f"at most {header.max_new_tokens} tokens, {header.batch} at once" for header in headers],
        "frames of a video": [str(header.frames) for header in headers],
        "machine": machines,
        "versions": versions,
        "begun": [min((header.created for header in headers if header.created), default="")],
    }
    return {name: "; ".join(dict.fromkeys(filter(None, found))) for name, found in values.items() if any(found)}


def _section(anchor: str, rows: Sequence[Row], found: Table, runs: Sequence[Run]) -> str:
    first = rows[0]
    own = [one for one in found.comparisons if (one.task, one.model) == (first.task, first.model)]
    methods = ", ".join(sorted({row.interval.method for row in rows}))
    numbers = {row.plan: str(place) for place, row in enumerate(rows, start=1)}
    return f"""<section id="{anchor}"><h2>{escape(first.task)}</h2>
<p class="soft">{escape(first.metric)} of {escape(first.model)}; intervals: {escape(methods)}</p>
{_plans(rows, own, numbers)}
<div class="charts">{_charts(rows, numbers)}</div>{_key(rows)}
{_against_baselines(own)}{_kinds(rows)}{_failures(runs)}{differences(anchor, runs)}</section>
"""


def _plans(rows: Sequence[Row], comparisons: Sequence[Versus], numbers: dict[str, str]) -> str:
    full = {one.plan: one for one in comparisons if one.other == "full"}
    columns: list[tuple[str, list[str]]] = [
        ("plan", [_name(row, numbers) for row in rows]),
        (
            "n",
            [str(row.n) + (f' <small class="bad">{row.failed} failed</small>' if row.failed else "") for row in rows],
        ),
        (
            "score",
            [f"{row.score:.1f} <small>{row.interval.low:.1f} to {row.interval.high:.1f}</small>" for row in rows],
        ),
        ("against full", [_difference(full.get(row.plan)) for row in rows]),
        ("of full", [percent(row.relative) for row in rows]),
        ("above chance", [percent(row.above_chance) for row in rows]),
        (
            "hard",
            [
                ABSENT if row.hard_score is None else f"{row.hard_score:.0f} <small>n = {row.hard_n}</small>"
                for row in rows
            ],
        ),
        ("tokens", [number(row.costs["n_visual_kept"], 1, 0) for row in rows]),
        ("per layer", [number(row.costs["n_visual_layer_average"], 1, 1) for row in rows]),
        ("TTFT ms", [number(row.costs["ttft_ms"], 1, 1) for row in rows]),
        ("tokens/s", [number(row.costs["decode_tok_s"], 1, 0) for row in rows]),
        ("GFLOP", [number(row.costs["prefill_flops"], 1e9, 3) for row in rows]),
        ("KV MB", [number(row.costs["kv_bytes"], 1e6, 2) for row in rows]),
        ("peak MB", [number(row.costs["peak_memory_bytes"], 1e6, 0) for row in rows]),
    ]
    shown = [(name, cells) for name, cells in columns if any(cell != ABSENT for cell in cells)]
    classes = ["baseline" if row.baseline not in ("", "full") else "" for row in rows]
    content = [(kind, [cells[place] for _, cells in shown]) for place, kind in enumerate(classes)]
    return f'<div class="wide">{table([name for name, _ in shown], content, kind="plans")}</div>'


def _name(row: Row, numbers: dict[str, str]) -> str:
    seeds = f" <small>{row.seeds} seeds</small>" if row.seeds > 1 else ""
    return f"<b>{numbers[row.plan]}</b><code>{escape(row.plan)}</code>{seeds}"


def _difference(found: Versus | None) -> str:
    """Write a difference with its sign, its interval and what the tests say of it."""
    if found is None:
        return ABSENT
    own = found.difference
    tests = [p for p in (own.p_bootstrap, own.p_mcnemar) if p is not None]
    kind, word = "soft", "no difference shown"
    if tests and max(tests) < _LEVEL and own.mean:
        kind, word = ("good", "better") if own.mean > 0 else ("bad", "worse")
    return f'{own.mean:+.1f} <small class="{kind}">{word}</small>{_tests(found)}'


def _tests(found: Versus) -> str:
    own, parts = found.difference, []
    if own.interval is not None and own.p_bootstrap is not None:
        parts.append(f"{own.interval.low:+.1f} to {own.interval.high:+.1f}, {chance(own.p_bootstrap)}")
    else:
        parts.append(f"no interval from fewer than {MIN_CLUSTERS} clusters")
    if own.p_mcnemar is not None:
        parts.append(f"McNemar {chance(own.p_mcnemar)}")
    return "".join(f" <small>{escape(part)}</small>" for part in parts)


def _charts(rows: Sequence[Row], numbers: dict[str, str]) -> str:
    timed = "ttft_ms" if any(row.costs["ttft_ms"] is not None for row in rows) else "e2e_ms"
    words = {"ttft_ms": "time to first token, ms, median", "e2e_ms": "whole answer, ms, median"}
    drawn = ((timed, words[timed], False), ("n_visual_layer_average", "visual tokens per layer", True))
    parts = []
    for name, label, logarithmic in drawn:
        points = [
            Point(
                "" if row.baseline not in ("", "full") else numbers[row.plan],
                f"{row.plan}: {row.score:.1f} at {cost:.1f}",
                row.baseline,
                cost,
                row.score,
                row.interval.low,
                row.interval.high,
            )
            for row in rows
            if (cost := row.costs[name]) is not None and (cost > 0 or not logarithmic)
        ]
        if points:
            parts.append(f"<figure>{scatter(points, label, rows[0].metric, logarithmic=logarithmic)}</figure>")
    return "".join(parts)


def _key(rows: Sequence[Row]) -> str:
    kinds = list(dict.fromkeys(row.baseline for row in rows))
    signs = "".join(
        f'<span><svg class="chart" viewBox="-8 -8 16 16" aria-hidden="true">{marker(kind, 0, 0)}</svg>'
        f"{escape(kind) or 'plan'}</span>"
        for kind in kinds
    )
    line = '<svg class="chart" viewBox="-8 -8 16 16" aria-hidden="true"><path class="front" d="M-8 0H8"/></svg>'
    return (
        f'<p class="key">{signs}<span>{line}Pareto front: nothing measured is as cheap and better</span>'
        "<span>Numbers: rows of the table. Bars: 95 % intervals.</span></p>"
    )


def _against_baselines(comparisons: Sequence[Versus]) -> str:
    others = [one for one in comparisons if one.other != "full"]
    if not others:
        return ""
    rows = [("", [f"<code>{escape(one.plan)}</code>", escape(one.other), _difference(one)]) for one in others]
    head = ["plan", "baseline", "points of difference"]
    return (
        f"<details><summary>Against baselines with as many tokens</summary>{table(head, rows, kind='plain')}</details>"
    )


def _kinds(rows: Sequence[Row]) -> str:
    """Show what else the summary of the task says; its headline is in the table above."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row.figures) if name != rows[0].metric]
    if not names:
        return ""
    content = [
        (
            "",
            [
                f"<code>{escape(row.plan)}</code>",
                *(f"{row.figures[name]:.1f}" if name in row.figures else ABSENT for name in names),
            ],
        )
        for row in rows
    ]
    return (
        "<details><summary>By kind of question, and further figures</summary>"
        f'<div class="wide">{table(["plan", *names], content, kind="plain")}</div></details>'
    )


def _failures(runs: Sequence[Run]) -> str:
    """Count failed questions by plan and by what went wrong."""
    counts = Counter((run.header.plan, record.error) for run in runs for record in run.records if record.error)
    if not counts:
        return '<p class="soft">No question failed.</p>'
    rows = [
        ("", [str(count), f"<code>{escape(plan)}</code>", escape(error[:300])])
        for (plan, error), count in counts.most_common()
    ]
    total = sum(counts.values())
    return (
        f'<details open><summary><span class="bad">Failed questions: {total}</span>, which count as wrong</summary>'
        f"{table(['count', 'plan', 'error'], rows, kind='plain')}</details>"
    )
