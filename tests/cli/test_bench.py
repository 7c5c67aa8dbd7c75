"""mmfast bench: tables, JSON and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmfast.cli import main

QUICK = ("bench", "--scale", "tiny", "--repeats", "1", "--new-tokens", "3")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(words)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_operations_and_models_are_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out_file = str(tmp_path / "r.json")
    run(capsys, *QUICK, "--match", "dpc_knn/64 tokens/b1", "--out", out_file)
    words = ("--only", "models", "--match", "Qwen2.5-VL-7B/b1/uni", "--plan", "uniform(keep=8)", "--out", out_file)
    status, out, err = run(capsys, *QUICK, *words)
    assert status == 0
    assert "1/1 tiny/model/Qwen2.5-VL-7B/b1/uniform(keep=8)" in err
    assert f"wrote {out_file}" in err
    assert "hf sdpa (baseline)" in out
    assert "uniform(keep=8)" in out
    assert "loop (baseline)" in out
    assert out.count("not measured") == 11
    assert "multiplies" in out


def test_json_holds_cells_and_goals(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--match", "compact/64 tokens/b2", "--out", str(tmp_path / "r.json"), "--json")
    status, out, _ = run(capsys, *QUICK, *words)
    found = json.loads(out)
    assert status == 0
    assert list(found["cells"]) == ["tiny/kernel/compact/64 tokens/b2"]
    assert {goal["verdict"] for goal in found["goals"]} == {"not measured"}
    assert json.loads((tmp_path / "r.json").read_text())["cells"] == found["cells"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "r.txt"), "--out=r.txt must end in .json"),
        (("--repeats", "0"), "--repeats=0 must be at least 1"),
        (("--new-tokens", "1"), "new_tokens=1 must be at least 2"),
        (("--plan", "divprun(keep=3)"), "divprun"),
        (("--runner", "nowhere.py"), "runner nowhere.py is no file"),
    ],
)
def test_misuse_is_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    status, out, err = run(capsys, *QUICK, *words)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
