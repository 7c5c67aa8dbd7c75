"""Measure speed on this machine: operations, and models with and without plans, against what it can do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfast.cli import common

if TYPE_CHECKING:
    from rich.table import Table

_WIDEST_BAR = 20
"""Signs of the longest bar."""
_FULL_BAR = 8.0
"""Times faster that the longest bar stands for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--scale",
        choices=("tiny", "small", "real"),
        help="shapes: real ones, or shrunken ones for seconds (tiny) or minutes (small) on a CPU; "
        "default: real on a GPU, small elsewhere",
    )
    parser.add_argument("--only", choices=("kernels", "models"), help="measure one of the two; default: both")
    parser.add_argument("--match", default="", metavar="TEXT", help="only cells whose name contains this")
    parser.add_argument("--plan", action="append", default=[], help="measure this plan, not the usual ones; repeatable")
    parser.add_argument(
        "--runner",
        action="append",
        default=[],
        type=Path,
        metavar="FILE.py",
        help="also run another library: a file that defines build(case), prefill(state) and decode(prefilled, tokens)",
    )
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="counted rounds of each cell (default 9)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="tokens of each answer (default 64)")
    parser.add_argument("--seconds", type=float, metavar="S", help="begin no cell after this time; call again to go on")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="results, by default a file of this machine and day in this folder; what is in it is not measured again",
    )
    parser.add_argument("--device", help="where to run, for example cuda:1; default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of all numbers; default: bfloat16 on a GPU, float32 elsewhere",
    )


def run(options: argparse.Namespace) -> None:
    """Measure and show."""
    import torch

    import mmfast
    from mmfast.bench import Options, judged, run_bench

    common.check_numbers(options, "repeats")
    if options.out is not None and options.out.suffix != ".json":
        raise ValueError(f"--out={options.out} must end in .json: results are what is written")
    device = common.device_of(options.device)
    cuda = device.type == "cuda"
    common.quiet_libraries()
    wanted = Options(
        scale=options.scale or ("real" if cuda else "small"),
        level=options.only,
        match=options.match,
        plans=tuple(mmfast.Plan.of(plan).to_text() for plan in options.plan),
        runners=tuple(options.runner),
        repeats=options.repeats,
        new_tokens=options.new_tokens,
        seconds=options.seconds,
        device=device,
        dtype=getattr(torch, options.dtype or ("bfloat16" if cuda else "float32")),
    )
    with _counting() as step:
        results = run_bench(wanted, options.out, before_cell=step)
    sys.stderr.write(f"wrote {results.path}\n")
    goals = [found.to_dict() for found in judged(results.content)]
    if options.json:
        common.write_json({**results.content, "goals": goals})
    else:
        show(results.content, goals)


@contextmanager
def _counting() -> Iterator[Callable[[str, int, int], None]]:
    """Show on stderr which cell is measured; one line each where nobody watches, so that a log tells how far it is."""
    watched = common.console(sys.stderr)
    if not watched.is_terminal:
        yield lambda key, done, total: watched.print(f"{done + 1}/{total} {key}")
        return
    with common.bar("") as move:
        yield lambda key, done, total: move(description=key, completed=done, total=total)


def show(content: Mapping[str, Any], goals: list[dict[str, Any]]) -> None:
    """Print operations, models and goals as tables."""
    console = common.console()
    cells = {key: cell for key, cell in content["cells"].items() if "sides" in cell}
    for title, table in (
        ("Operations", _operations({key: cell for key, cell in cells.items() if "operation" in cell})),
        ("Models", _models({key: cell for key, cell in cells.items() if "model" in cell})),
    ):
        if table.row_count:
            table.title = title
            console.print(table)
    for key, cell in content["cells"].items():
        for reason in (cell.get(name) for name in ("failed", "out_of_memory", "lost")):
            if reason:
                console.print(f"not measured: {key}: {common.one_line(reason)}")
        for side, reason in cell.get("left_out", {}).items():
            if side != "triton" or content["machine"]["kind"] == "cuda":
                console.print(f"left out: {key}: {side}: {common.one_line(reason)}")
    console.print(_goals(goals))
    ceilings = content["calls"][-1]["ceilings"]
    console.print(
        f"{content['machine']['device']}: copies {ceilings['copy'] / 1e9:.1f} GB/s, multiplies "
        f"{ceilings['matmul'] / 1e12:.3g} TFLOP/s in {content['calls'][-1]['dtype']}, measured at the start. Medians "
        "of runs in turn after a warm-up, quartiles in the file; <- marks what is slower than its baseline."
    )


def _bar(faster: float) -> str:
    return "#" * max(1, round(_WIDEST_BAR * min(faster, _FULL_BAR) / _FULL_BAR)) + (" <-" if faster < 1.0 else "")


def _table(*columns: tuple[str, str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    return table


def _operations(cells: Mapping[str, Any]) -> Table:
    table = _table(
        ("operation", "left"),
        ("form", "left"),
        ("ms", "right"),
        ("GB/s", "right"),
        ("of copy", "right"),
        ("TFLOP/s", "right"),
        ("of matmul", "right"),
        ("faster", "right"),
        ("", "left"),
    )
    for key, cell in cells.items():
        for side, row in cell["sides"].items():
            faster = row["faster"]["median"] if "faster" in row else None
            is_baseline = side == cell["baseline"]
            table.add_row(
                key,
                f"{side}{' (baseline)' if is_baseline else ''}",
                f"{1e3 * row['seconds']['median']:.3f}",
                f"{row['bytes_per_second'] / 1e9:.1f}",
                f"{row['share_of_copy']:.0%}",
                f"{row['flops_per_second'] / 1e12:.3f}",
                f"{row['share_of_matmul']:.0%}",
                "" if faster is None or is_baseline else f"{faster:.2f}x",
                "" if faster is None or is_baseline else _bar(faster),
            )
    return table


def _models(cells: Mapping[str, Any]) -> Table:
    table = _table(
        ("model", "left"),
        ("batch", "right"),
        ("prompt", "right"),
        ("with", "left"),
        ("first ms", "right"),
        ("of floor", "right"),
        ("tokens/s", "right"),
        ("of floor", "right"),
        ("peak MB", "right"),
        ("first", "right"),
        ("per token", "right"),
        ("in all", "right"),
        ("", "left"),
    )
    for cell in cells.values():
        for side, row in cell["sides"].items():
            is_baseline = side == cell["baseline"]
            faster = [row[f"faster_{what}"]["median"] for what in ("first_token", "per_token", "total")]
            table.add_row(
                cell["model"],
                str(cell["batch"]),
                str(cell["prompt_tokens"]),
                f"{side}{' (baseline)' if is_baseline else ''}",
                f"{1e3 * row['first_token']['median']:.1f}",
                f"{row['share_of_prefill_floor']:.0%}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['share_of_decode_floor']:.0%}",
                f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] else "-",
                *("" if is_baseline else f"{value:.2f}x" for value in faster),
                "" if is_baseline else _bar(faster[-1]),
            )
    return table


def _goals(goals: list[dict[str, Any]]) -> Table:
    table = _table(("goal", "left"), ("measured", "right"), ("", "left"))
    table.title = "Goals on a GPU"
    for goal in goals:
        table.add_row(goal["goal"], "" if goal["value"] is None else f"{goal['value']:.4g}", goal["verdict"])
    return table
