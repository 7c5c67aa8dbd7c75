"""``mmfast eval``: output, exit status and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmfast.cli import main
from mmfast.cli.eval import shard_of_process

TINY = ("--task", "shapes-image", "--limit", "2", "--no-baselines", "--device", "cpu")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["eval", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_table_is_shown_and_shown_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, *TINY, "--plan", "uniform(keep=32)", "--out", str(tmp_path))
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith("shapes-image on embedded: accuracy")
    assert [line.split()[:2] for line in lines[2:4]] == [["full", "2"], ["uniform(keep=32)", "2"]]
    assert "GFLOP: two per multiply-accumulate" in out
    assert f"results are in {tmp_path}" in err
    assert run(capsys, "--show", "--out", str(tmp_path)) == (0, out, "")


def test_json_holds_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, *TINY, "--plan", "divprune(keep=64)", "--out", str(tmp_path), "--json", "--seed", "3")
    found = json.loads(out)
    assert status == 0
    assert [(row["plan"], row["costs"]["n_visual_kept"]) for row in found["rows"]] == [
        ("full", 256),
        ("divprune(keep=64)", 64),
    ]
    assert found["comparisons"][0]["other"] == "full"


def test_list_shows_what_can_be_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "--list", "--json", "--data", str(tmp_path))
    rows = {row["task"]: row for row in json.loads(out)["tasks"]}
    assert status == 0
    assert (rows["shapes-image"]["data"], rows["shapes-video"]["media"]) == ("ready", "video")
    assert run(capsys, "--list")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "shape-image"), "there is no task 'shape-image'; did you mean 'shapes-image'"),
        (("--task", "xyz"), "there is no task 'xyz'; known are"),
        ((), "--task is missing"),
        (("--task", "shapes-image", "--shard", "2/2"), "--shard=2/2 must be I/N with I from 0 to N-1"),
        (("--task", "shapes-image", "--shard", "half"), "--shard=half must be I/N"),
        (("--task", "shapes-image", "--shard", "auto"), "--shard=auto needs torchrun or accelerate launch"),
        (("--task", "shapes-image", "--limit", "0"), "--limit=0 must be at least 1"),
        (("--task", "shapes-image", "--batch", "0"), "--batch=0 must be at least 1"),
        (("--task", "shapes-image", "--seed", "1"), "--seed=1 draws questions and needs --limit"),
        (("--task", "shapes-image", "--plan", "divprun(keep=3)"), "unknown method 'divprun'; did you mean divprune"),
        (("--show", "--out", "nowhere"), "nowhere does not exist"),
    ],
)
def test_misuse_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_results_of_something_else_are_not_mixed_in(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, *TINY, "--out", str(tmp_path))[0] == 0
    status, _, err = run(capsys, *TINY, "--out", str(tmp_path), "--max-new-tokens", "3")
    assert status == 2
    assert "max_new_tokens: 10 there, 3 now" in err
    assert "Choose another folder" in err


def test_a_launcher_numbers_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert shard_of_process() == (1, 4)
