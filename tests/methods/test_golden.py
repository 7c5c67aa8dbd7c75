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
    of_folders = {(path.stem,) for path in (TESTS / "golden_checkers").glob("*.py")}
    of_files = {(path.parent.name, path.stem) for path in (TESTS / "golden_checkers").glob("*/*.py")}
    vectors = SCRIPT.files(TESTS / "golden")
    assert of_folders == {(path.parent.name,) for path in vectors if path.suffix == ".npz"}
    assert of_files == {(path.parent.name, path.stem) for path in vectors if path.suffix == ".json"}


def test_a_wrong_vector_fails_and_an_unknown_one_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("uniform", "not_a_method"):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "case.npz", num_tokens=10, k=3, keep_idx=np.array([0, 1, 2]))
    (tmp_path / "uniform" / "broken.npz").write_bytes(b"no zip file")
    assert SCRIPT.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 passed, 2 failed, 1 without a checker"
    assert len(lines) == 4


def test_a_json_file_is_checked_by_the_checker_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkers, vectors = tmp_path / "checkers", tmp_path / "vectors"
    for folder in (checkers / "several", vectors / "several"):
        folder.mkdir(parents=True)
    (checkers / "several" / "sums.py").write_text(
        "def check(case):\n    assert sum(case['of']) == case['is'], 'another sum'\n", encoding="utf-8"
    )
    (checkers / "several.py").write_text("def check(case):\n    raise AssertionError\n", encoding="utf-8")
    monkeypatch.setattr(SCRIPT, "_CHECKERS", checkers)
    vector = vectors / "several" / "sums.json"

    vector.write_text('{"of": [1, 2], "is": 3}', encoding="utf-8")
    assert SCRIPT.check_file(vector) == ("passed", "")
    vector.write_text('{"of": [1, 2], "is": 4}', encoding="utf-8")
    assert SCRIPT.check_file(vector) == ("failed", "another sum")
    vector.write_text("no json", encoding="utf-8")
    result, detail = SCRIPT.check_file(vector)
    assert (result, detail.split(":")[0]) == ("failed", "JSONDecodeError")
    (vectors / "several" / "products.json").write_text("{}", encoding="utf-8")
    assert SCRIPT.main([str(vectors)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 1 failed, 1 without a checker"
