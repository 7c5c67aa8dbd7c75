"""The committed golden vectors, and the script that checks any folder of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

TESTS = Path(__file__).parents[1]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_golden", TESTS / "check_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


@pytest.mark.parametrize("path", SCRIPT.files(TESTS / "golden"), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_golden_vector(path: Path) -> None:
    assert SCRIPT.check_file(path) == ("passed", "")


def test_every_checker_has_vectors() -> None:
    checkers = {path.stem for path in (TESTS / "golden_checkers").glob("*.py")}
    assert checkers == {path.name for path in (TESTS / "golden").iterdir()}


def test_a_wrong_vector_fails_and_an_unknown_one_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("uniform", "not_a_method"):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "case.npz", num_tokens=10, k=3, keep_idx=np.array([0, 1, 2]))
    (tmp_path / "uniform" / "broken.npz").write_bytes(b"no zip file")
    assert SCRIPT.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 passed, 2 failed, 1 without a checker"
    assert len(lines) == 4
