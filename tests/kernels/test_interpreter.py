"""Kernels on a machine without a GPU: each file again, in a process in which Triton interprets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [
    path for path in sorted(HERE.glob("test_*.py")) if path != Path(__file__) and "mark.interpreter" in path.read_text()
]


def test_there_is_something_to_interpret() -> None:
    assert FILES


# File by file, so that workers share them.
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path: Path) -> None:
    command = [sys.executable, "-m", "pytest", str(path), "-q", "-m", "interpreter and not gpu"]
    command += ["-p", "no:cacheprovider"]
    # How this process was told to run is not meant for that one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=HERE.parents[1], env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert "passed" in last
    assert "skipped" not in last, done.stdout
