"""Kernels on a machine without a GPU: each file again, in a process in which Triton interprets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [
    path for path in sorted(HERE.glob("test_*.py")) if path != Path(__file__) and "mark.interpreter" in path.read_text()
]

SHARES = 4


def test_there_is_something_to_interpret() -> None:
    assert FILES


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


# In four shares, so that workers divide them and starting a process is not what takes the time.
@needs_triton
@pytest.mark.parametrize("share", range(SHARES))
def test_interpreted(share: int) -> None:
    interpret(FILES[share::SHARES], "interpreter and not gpu and not slow")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in FILES if "mark.slow" in path.read_text()], ids=lambda path: path.stem
)
def test_slow_ones_interpreted(path: Path) -> None:
    interpret([path], "interpreter and not gpu and slow", "--slow")


CONTRACT = HERE.parent / "kv" / "test_contract.py"
SLICES = {
    "few": [
        "equal_the_reference and (gemma3-quest or gemma3-adakv)",
        "nothing_is_left_behind and gemma3-adakv",
        "an_exception and gemma3-kivi",
        "counts_every_byte and gemma3-kivi",
    ],
    "more": [
        "equal_the_reference and (llava-quest or gemma3-kivi or qwen2_5_vl-razor_attention)",
        "nothing_is_left_behind and qwen2_5_vl-quest",
        "half_precision and llava-int8",
    ],
}
"""Parts of the contract of caches: methods that retrieve, evict and pack."""


@needs_triton
@pytest.mark.parametrize("name", ["few", pytest.param("more", marks=pytest.mark.slow)])
def test_the_contract_of_caches_holds_with_kernels(name: str) -> None:
    interpret([CONTRACT], "not gpu", "--slow", "-k", " or ".join(f"({one})" for one in SLICES[name]))


def interpret(paths: Sequence[Path], which: str, *more: str) -> None:
    command = [sys.executable, "-m", "pytest", *map(str, paths), "-q", "-m", which, *more]
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
