"""The table of an evaluation as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mmfast.eval.statistics import MIN_CLUSTERS

if TYPE_CHECKING:
    from mmfast.eval.summary import Row, Table, Versus

ABSENT = "-"
"""What stands where nothing was measured."""

_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("plan", lambda row: row.plan + (f" x{row.seeds} seeds" if row.seeds > 1 else "")),
    ("n", lambda row: str(row.n)),
    ("failed", lambda row: str(row.failed)),
    ("score", lambda row: f"{row.score:.1f}"),
    ("95 %", lambda row: f"{row.interval.low:.1f} to {row.interval.high:.1f}"),
    ("of full", lambda row: percent(row.relative)),
    ("above chance", lambda row: percent(row.above_chance)),
    ("hard", lambda row: ABSENT if row.hard_score is None else f"{row.hard_score:.0f} (n={row.hard_n})"),
    ("tokens", lambda row: number(row.costs["n_visual_kept"], 1, 0)),
    ("per layer", lambda row: number(row.costs["n_visual_layer_average"], 1, 1)),
    ("TTFT ms", lambda row: number(row.costs["ttft_ms"], 1, 1)),
    ("tok/s", lambda row: number(row.costs["decode_tok_s"], 1, 0)),
    ("GFLOP", lambda row: number(row.costs["prefill_flops"], 1e9, 3)),
    ("KV MB", lambda row: number(row.costs["kv_bytes"], 1e6, 2)),
    ("peak MB", lambda row: number(row.costs["peak_memory_bytes"], 1e6, 0)),
)


def table_text(table: Table) -> str:
    """Write one block per task and model, then the comparisons and the notes.

    Example:
        >>> from mmfast.eval.summary import Table
        >>> table_text(Table((), ()))
        'no results yet'
    """
    if not table.rows:
        return "\n".join(["no results yet", *table.notes])
    blocks: dict[tuple[str, str, str], list[Row]] = {}
    for row in table.rows:
        blocks.setdefault((row.task, row.model, row.metric), []).append(row)
    parts = []
    for (task, model, metric), rows in blocks.items():
        methods = sorted({row.interval.method for row in rows})
        parts.append(f"{task} on {model}: {metric}; intervals at 95 %: {', '.join(methods)}")
        parts += _aligned([[title for title, _ in _COLUMNS], *([write(row) for _, write in _COLUMNS] for row in rows)])
        parts.append("")
        own = [found for found in table.comparisons if (found.task, found.model) == (task, model)]
        parts += [_sentence(found) for found in own]
        if own:
            parts.append("")
    parts.append(
        "GFLOP: two per multiply-accumulate, prefill of the language model. TTFT: vision to first token, without "
        "preprocessing, median. hard: percent of the questions that the full model has right and down-sampling wrong."
    )
    return "\n".join([*parts, *(f"note: {note}" for note in table.notes)])


def _sentence(found: Versus) -> str:
    own = found.difference
    tests = []
    if own.interval is not None and own.p_bootstrap is not None:
        tests.append(
            f"{own.interval.low:+.1f} to {own.interval.high:+.1f}, {own.interval.method} {chance(own.p_bootstrap)}"
        )
    else:
        tests.append(f"no interval from fewer than {MIN_CLUSTERS} clusters")
    if own.p_mcnemar is not None:
        tests.append(f"McNemar {chance(own.p_mcnemar)}")
    return f"{found.plan} against {found.other}: {own.mean:+.1f} points ({', '.join(tests)}; n={own.n})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pad cells; columns in which nothing is known are left out."""
    shown = [i for i in range(len(rows[0])) if any(row[i] != ABSENT for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in shown]
    return [
        "  ".join(
            row[i].ljust(width) if i == 0 else row[i].rjust(width) for i, width in zip(shown, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def number(value: float | None, unit: float, digits: int) -> str:
    """Write a quantity in a unit.

    Example:
        >>> number(2.5e6, 1e6, 2), number(None, 1, 0)
        ('2.50', '-')
    """
    return ABSENT if value is None else f"{value / unit:.{digits}f}"


def percent(share: float | None) -> str:
    """Write a share.

    Example:
        >>> percent(0.5)
        '50.0 %'
    """
    return ABSENT if share is None else f"{100 * share:.1f} %"


def chance(p: float) -> str:
    """Write a p-value.

    Example:
        >>> chance(0.0002), chance(0.04)
        ('p < 0.001', 'p = 0.040')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
