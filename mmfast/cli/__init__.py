"""The command line: one file per sub-command, each of which parses, calls and shows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import mmfast
from mmfast.cli import ask, compare, doctor, methods

COMMANDS = (ask, compare, methods, doctor)
MISUSE = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and a hint."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(MISUSE, f"mmfast: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
    top = _Parser(prog="mmfast", description="Make vision-language models faster without forking them.")
    top.add_argument("--version", action="version", version=f"mmfast {mmfast.__version__}")
    commands = top.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").strip().split("\n")[0]
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after the program's name; None takes those of the process.

    Returns:
        The exit status: 0, 2 for misuse or unusable input, 130 after Ctrl-C.
    """
    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        sys.stderr.write("mmfast: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        if options.debug:
            raise
        sys.stderr.write(f"mmfast: {' '.join(str(error).split())} (--debug shows the traceback)\n")
        return MISUSE
    return status
