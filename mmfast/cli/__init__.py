"""The command line: one file per sub-command, each of which parses, calls and shows."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import mmfast
from mmfast.cli import ask, bench, compare, doctor, eval, methods, train, ui
from mmfast.cli.common import one_line

COMMANDS = (ask, compare, bench, eval, ui, methods, doctor, train)
UNEXPECTED = 1
MISUSE = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and a hint."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISUSE, f"mmfast: {one_line(message)} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
    top = _Parser(prog="mmfast", description="Make vision-language models faster without forking them.")
    top.add_argument("--version", action="version", version=f"mmfast {mmfast.__version__}")
    commands = top.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").strip().split("\n")[0]
        sub = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after the program's name; None takes those of the process.

    Returns:
        The exit status: 0, 2 for misuse or unusable input, 1 for an error nobody foresaw, 130 after Ctrl-C.
    """
    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        options.run(options)
        # Here and not at exit, where a reader that went away could no longer be dealt with.
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("mmfast: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has what it wanted (`mmfast methods | head -3`); what is left to write goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.debug:
            raise
        foreseen = isinstance(error, ValueError | TypeError | OSError | ImportError)
        message = one_line(str(error)) or "no message"
        what = message if foreseen else f"unexpected {type(error).__name__}: {message}"
        hint = "mmfast doctor looks for the cause, " if isinstance(error, ImportError) else ""
        sys.stderr.write(f"mmfast: {what} ({hint}--debug shows the traceback)\n")
        return MISUSE if foreseen else UNEXPECTED
    return 0
