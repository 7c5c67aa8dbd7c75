"""Run the full model and several plans in turn, and show what each costs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mmfast
from mmfast.cli import common

if TYPE_CHECKING:
    from mmfast.compare import PlanComparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    common.add_question_arguments(parser)
    parser.add_argument("--plan", action="append", required=True, help="a plan; repeat the option for more")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="counted runs of each plan (default 3)")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="write a page with the kept patches drawn")


def run(options: argparse.Namespace) -> None:
    """Compare and show."""
    from mmfast.cli.figures import as_json
    from mmfast.cli.html import page
    from mmfast.compare import compare_plans

    common.check_numbers(options, "frames", "max_new_tokens", "repeats")
    plans = [mmfast.Plan.of(plan) for plan in options.plan]
    common.check_page("out", options.out)
    device = common.device_of(options.device)
    common.quiet_libraries()
    with common.working("reading"):
        media = common.read_media(options.media, options.frames)
    common.notes(options, media)
    with common.working("loading the model"):
        model, processor = common.load_model(options, device)
        inputs = common.build_inputs(processor, model, options.question, media)
    names = {"full", *(plan.to_text() for plan in plans)}
    with common.bar("runs", len(names) * (options.repeats + 1)) as move:
        result = compare_plans(
            model,
            plans,
            inputs,
            max_new_tokens=options.max_new_tokens,
            repeats=options.repeats,
            after_run=lambda plan: move(advance=1),
        )
    answers = [common.answer_text(processor, run.new_tokens[0]) for run in result.runs]
    if options.out is not None:
        name = type(model).__name__ if options.model else f"{type(model).__name__}, {common.DEMO}"
        options.out.write_text(page(result, answers, media, processor, options.question, name), encoding="utf-8")
        sys.stderr.write(f"wrote {options.out}\n")
    if options.json:
        common.write_json(as_json(result, answers, options.question))
    else:
        show(result, answers)


def show(result: PlanComparison, answers: Sequence[str]) -> None:
    """Print one column per plan, then a plain sentence per plan."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from mmfast.cli.figures import figures, memory_note

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for run in result.runs:
        table.add_column(run.plan, justify="right", overflow="fold")
    table.add_row("answer", *(common.one_line(answer) or "(none)" for answer in answers), end_section=True)
    for figure in figures(result):
        cells = zip(figure.values, figure.shares, strict=True)
        table.add_row(
            f"{figure.label} ({figure.unit})" if figure.unit else figure.label,
            *(f"{value}  {f'({share})' if share else '':>6}" for value, share in cells),
        )
    console = common.console()
    console.print(table)
    for verdict in result.verdicts():
        console.print(verdict)
    console.print(
        f"\nBaseline: {result.setting}. In brackets: share of the full model's. Medians of {result.repeats} runs in "
        "turn after one warm-up of each; every run encodes the media anew."
    )
    console.print(memory_note(result))
