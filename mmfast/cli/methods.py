"""List the methods, or show one with its options."""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

import mmfast
from mmfast.cli import common
from mmfast.registry import get


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this method's options")


def run(options: argparse.Namespace) -> int:
    """Show the list or one method."""
    if options.name is not None:
        info = get(options.name)
        if options.json:
            common.write_json(as_json(info))
        else:
            _show(info)
        return 0
    listed = mmfast.methods()
    if options.json:
        common.write_json([as_json(info) for info in listed])
        return 0
    console = common.out()
    wide = console.width >= 140
    table = Table(box=SIMPLE)
    for column in ("method", "stage", "training", "paper"):
        table.add_column(column, no_wrap=True)
    for column in ("kind", "source") if wide else ():
        table.add_column(column, no_wrap=True)
    table.add_column("what it does", ratio=1)
    for info in listed:
        training = "none" if info.training_free else "needed"
        extra = (info.kind, info.source) if wide else ()
        table.add_row(info.name, info.stage, training, info.paper or "baseline", *extra, info.summary)
    console.print(table)
    return 0


def as_json(info: mmfast.MethodInfo) -> dict[str, Any]:
    """Return a method as plain values."""
    return {
        "name": info.name,
        "stage": info.stage,
        "kind": info.kind,
        "summary": info.summary,
        "paper": info.paper,
        "source": info.source,
        "training_free": info.training_free,
        "needs": list(info.needs),
        "options": info.options,
    }


def _show(info: mmfast.MethodInfo) -> None:
    lines = [f"{info.name}  ({info.stage}, {info.kind})", "", inspect.getdoc(info.method) or info.summary, ""]
    if info.paper:
        lines.append(f"paper    {info.paper}")
    if info.source:
        lines.append(f"source   {info.source}")
    lines.append("options  " + ", ".join(f"{name}={value!r}" for name, value in info.options.items()))
    lines.append(f'example  mmfast ask photo.jpg "what is this?" --plan "{info.name}()"')
    sys.stdout.write("\n".join(lines) + "\n")
