"""List the methods, or show one with its options."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import mmfast
from mmfast.cli import common

COLUMNS = ("method", "stage", "action", "needs", "positions", "later turns", "training", "vectors", "paper", "summary")
_WIDE = 190
_NARROW = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this method with its options")


def run(options: argparse.Namespace) -> None:
    """Show the list or one method."""
    from mmfast.registry import get

    if options.name is not None:
        info = get(options.name)
        if options.json:
            common.write_json(as_json(info))
        else:
            _show(info)
    elif options.json:
        common.write_json({"methods": [as_json(info) for info in mmfast.methods()]})
    else:
        _list(mmfast.methods())


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
        "action": info.action,
        "later_turns": info.turns,
        "positions": info.positions,
        "official_vectors": info.vectors,
        "needs": list(info.needs),
        "options": {name: "required" if value is MISSING else value for name, value in info.options.items()},
        "doc": inspect.getdoc(info.method) or "",
    }


def _list(listed: list[mmfast.MethodInfo]) -> None:
    console = common.console()
    rows = [
        (
            info.name,
            info.stage,
            info.action,
            ", ".join(info.needs) or "-",
            info.positions,
            info.turns,
            "no" if info.training_free else "yes",
            "yes" if info.vectors else "no",
            info.paper or "baseline",
            info.summary,
        )
        for info in listed
    ]
    # Where ten columns do not fit, several tables with fewer do.
    parts: list[Sequence[int]] = [range(10)] if console.width >= _WIDE else [range(8), (0, 8, 9)]
    if console.width < _NARROW:
        parts = [(0, 1, 2, 6, 7), (0, 3), (0, 4, 5), (0, 8, 9)]
    for part in parts:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for place in part:
            table.add_column(COLUMNS[place], no_wrap=place not in (3, 9), overflow="fold")
        for row in rows:
            table.add_row(*(row[place] for place in part))
        console.print(table)


def _show(info: mmfast.MethodInfo) -> None:
    facts = {
        "stage": info.stage,
        "kind": info.kind,
        "action": info.action,
        "training": "not needed" if info.training_free else "needed",
        "positions": info.positions,
        "later turns": "see what the first question left" if info.reads_question else "see what suits any question",
        "vectors": "tested against official ones" if info.vectors else "no official ones",
        "paper": info.paper or "baseline",
        "source": info.source or "-",
        "needs": ", ".join(info.needs) or "-",
    }
    defaults = {name: "required" if value is MISSING else repr(value) for name, value in info.options.items()}
    example = ", ".join(f"{name}={value!r}" for name, value in info.options.items() if name in ("layer", "keep"))
    lines = [
        info.name,
        "",
        inspect.getdoc(info.method) or info.summary,
        "",
        *_aligned(facts),
        "",
        "options and their defaults",
        *(f"  {line}" for line in _aligned(defaults)),
        "",
        "example",
        f'  mmfast ask photo.jpg "what is this?" --plan "{info.name}({example})"',
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _aligned(pairs: dict[str, str]) -> list[str]:
    width = max(map(len, pairs), default=0)
    return [f"{name:<{width}}  {value}" for name, value in pairs.items()]
