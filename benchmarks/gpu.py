"""Everything that needs a GPU in one call: the kernels' tests, then as many measurements as there is time for.

    python benchmarks/gpu.py [--seconds S] [--tests-seconds S] [--no-tests] [--folder FOLDER] [BENCH OPTIONS...]

What is written while it runs can be read at any time, and a second call goes on where the first one ended:
``tests-<machine>-<date>.txt`` holds the output of the tests and ``bench-<machine>-<date>.json`` the results of
``mmfast bench``, to which options that are not known here are handed on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from mmfast.bench.results import default_path

ROOT = Path(__file__).parents[1]
TESTS = ("tests/kernels",)
LEAST = 30.0
"""Seconds that must be left for a run to be begun."""
ENDING = 20.0
"""Seconds in which a cell that was begun in time should be finished."""


def watched(command: list[str], seconds: float, log: Path | None = None) -> int:
    """Run a command for at most some time; what it prints is shown, and written to a file line by line.

    Returns:
        Its exit status; 124 if it was stopped.
    """
    if log is None:
        try:
            return subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return 124
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        stop = threading.Timer(seconds, process.kill)
        stop.start()
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            file.write(line)
            file.flush()
        status = process.wait()
        stopped = not stop.is_alive()
        stop.cancel()
        if stopped:
            file.write(f"stopped after {seconds:.0f} s\n")
        return 124 if stopped else status


def main() -> int:
    """Run tests and measurements; the exit status is 0 if both ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything (default 570)")
    parser.add_argument("--tests-seconds", type=float, default=200.0, help="of these, most for tests (default 200)")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", help="for the files")
    options, handed_on = parser.parse_known_args()
    begin = time.monotonic()

    def left() -> float:
        return options.seconds - (time.monotonic() - begin)

    options.folder.mkdir(parents=True, exist_ok=True)
    out = default_path(options.folder.resolve(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    status = 0
    if not options.no_tests:
        command = [sys.executable, "-u", "-m", "pytest", *TESTS, "-m", "gpu", "-v", "--durations=20"]
        log = out.with_name(out.name.replace("bench-", "tests-")).with_suffix(".txt")
        status = watched(command, min(options.tests_seconds, left()), log)
    measured = 1
    # A device that is lost ends the process; another goes on with the next cell.
    while measured not in (0, 2) and left() > LEAST:
        seconds = left()
        command = [sys.executable, "-m", "mmfast", "bench", "--out", str(out)]
        measured = watched([*command, "--seconds", str(seconds - ENDING), *handed_on], seconds)
    return status or measured


if __name__ == "__main__":
    sys.exit(main())
