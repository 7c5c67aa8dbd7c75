"""Run the full model and several plans in turn, and show what each costs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import mmfast
from mmfast.cli import common
from mmfast.cli.html import page
from mmfast.compare import PlanComparison, compare_plans, decode_speed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("media", nargs="+", metavar="MEDIA", help="images, or one video")
    parser.add_argument("question", metavar="QUESTION", help="the question")
    parser.add_argument("--plan", action="append", required=True, help="a plan; repeat the option for more")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="counted runs of each (default 3)")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="write a page with the kept patches drawn")
    common.add_model_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Compare and show."""
    common.quiet_libraries()
    plans = [mmfast.Plan.of(plan) for plan in options.plan]
    if options.out is not None and not options.out.resolve().parent.is_dir():
        raise ValueError(f"--out={options.out}: its folder does not exist; create it first")
    media = common.read_media(options.media, options.frames)
    common.notes(options, media)
    with common.working("loading the model"):
        model, processor = common.load_model(options)
    inputs = common.build_inputs(processor, model, options.question, media)
    count = len({plan.to_text() for plan in plans} | {"full"})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("runs", total=count * (options.repeats + 1))
        result = compare_plans(
            model,
            plans,
            inputs,
            max_new_tokens=options.max_new_tokens,
            repeats=options.repeats,
            after_run=lambda name: progress.advance(task),
        )
    answers = [common.answer_text(processor, run.new_tokens[0]) for run in result.runs]
    if options.json:
        common.write_json(as_json(result, answers, options))
    else:
        show(result, answers)
    if options.out is not None:
        demo = common.DEMO_NOTE if options.model is None else ""
        content = page(result, answers, media.pictures, options.question, type(model).__name__, demo)
        options.out.write_text(content, encoding="utf-8")
        sys.stderr.write(f"wrote {options.out}\n")
    return 0


def as_json(result: PlanComparison, answers: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Return the comparison as plain values."""
    return {
        "question": options.question,
        "setting": result.setting,
        "repeats": result.repeats,
        "runs": [{**run.to_dict(), "answer": answer} for run, answer in zip(result.runs, answers, strict=True)],
        "verdicts": result.verdicts(),
    }


def rows(result: PlanComparison, answers: list[str]) -> list[tuple[str, ...]]:
    """Return the table as text, the header first; shared by terminal and page."""
    cuda = any(run.peak_bytes for run in result.runs)
    header = (
        "plan", "answer", "visual tokens in", "per layer", "prefill ms", "decode tok/s", "total s", "KV MB", "GMAC",
        "agreement", *(("peak MB",) if cuda else ()),
    )  # fmt: skip
    found = [header]
    for run, answer in zip(result.runs, answers, strict=True):
        speed = decode_speed(run.timing)
        found.append(
            (
                run.plan,
                answer,
                str(run.report.entered_tokens),
                f"{run.report.layer_average:.0f}",
                f"{1e3 * run.timing.first_token:.1f}",
                f"{speed:.1f}" if speed else "-",
                f"{run.timing.total:.3f}",
                f"{run.report.kv_bytes / 1e6:.2f}",
                f"{run.report.flops / 1e9:.2f}",
                f"{run.agreement:.0%}",
                *((f"{run.peak_bytes / 1e6:.0f}",) if cuda else ()),
            )
        )
    return found


def show(result: PlanComparison, answers: list[str]) -> None:
    """Print the table and a plain sentence per plan."""
    header, *body = rows(result, answers)
    table = Table(title=f"median of {result.repeats} runs in turn; {result.setting}", title_justify="left")
    for name in header:
        table.add_column(name, justify="left" if name in ("plan", "answer") else "right", overflow="fold")
    for row in body:
        table.add_row(*row)
    console = common.out()
    console.print(table)
    for verdict in result.verdicts():
        console.print(verdict, markup=False, highlight=False)
    console.print(memory_note(result), markup=False, highlight=False)


def memory_note(result: PlanComparison) -> str:
    """Say what is known of memory."""
    if any(run.peak_bytes for run in result.runs):
        return "Peak memory is the most the device held during each plan's runs."
    peak = max(run.report.peak_bytes for run in result.runs)
    return f"Peak memory of the process: {peak / 1e6:.0f} MB over all runs (a CPU cannot tell the plans apart)."
