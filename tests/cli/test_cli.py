"""Every sub-command through main(): output, exit status and errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import mmfast
from mmfast.cli import main
from mmfast.media import sample

SCENE = str(sample("scenes/scene_0.png"))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(words)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def question(family: str = "color") -> tuple[str, str]:
    rows = [json.loads(line) for line in sample("scenes/questions.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["image"] == "scene_0.png" and row["family"] == family)
    return row["question"], row["answer"]


def test_ask_streams_the_answer_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    text, answer = question()
    status, out, err = run(capsys, "ask", SCENE, text, "--plan", "divprune(keep=64)")
    assert status == 0
    assert out.splitlines()[0] == answer
    assert "256 tokens -> 64 into the LLM" in out
    assert "knows coloured shapes and short text, nothing else" in err


def test_ask_prints_json(capsys: pytest.CaptureFixture[str], media: Path) -> None:
    status, out, _ = run(capsys, "ask", str(media / "clip.mp4"), "what color is the ring?", "--frames", "2", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["answer"] == "orange"
    assert found["report"]["plan"] == "full"
    assert [item["tokens"] for item in found["report"]["media"]] == [256, 256]


def test_compare_shows_every_plan_and_writes_a_page(
    capsys: pytest.CaptureFixture[str], media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    page = tmp_path / "page.html"
    plans = ("--plan", "divprune(keep=64)", "--plan", "divprune(keep=128) + pyramiddrop()")
    words = ("what <b>color</b> is the ring?", "--repeats", "1", "--max-new-tokens", "4", "--frames", "2")
    status, out, err = run(capsys, "compare", str(media / "clip.mp4"), *words, *plans, "--out", str(page))
    assert status == 0
    assert all(name in out for name in ("full", "divprune(keep=64)", "divprune(keep=128) + pyramiddrop()"))
    assert "sdpa attention, float32" in out
    assert out.count("end to end") == 2
    content = page.read_text()
    assert "<b>" not in content
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/jpeg;base64,', content)) == 3 * 2
    assert not re.search(r'(src|href)="(?!data:)', content)
    assert not re.search(r"url\(|@import|https?://", content)
    assert f"wrote {page}" in err


def test_compare_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    text, answer = question()
    plan = "uniform(keep=64)"
    status, out, _ = run(capsys, "compare", SCENE, text, "--plan", plan, "--repeats", "1", "--json")
    found = json.loads(out)
    full, uniform = found["runs"]
    assert status == 0
    assert (full["plan"], full["answer"], full["agreement"]) == ("full", answer, 1.0)
    assert uniform["report"]["entered_tokens"] == 64
    assert uniform["report"]["kv_bytes"] < full["report"]["kv_bytes"]
    assert full["report"]["kv_bytes"] == full["report"]["full_kv_bytes"]
    assert uniform["report"]["flops"] < full["report"]["flops"] == full["report"]["full_flops"]
    assert len(found["verdicts"]) == 1


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "methods")
    assert status == 0
    assert all(info.name in out for info in mmfast.methods())
    status, out, _ = run(capsys, "methods", "--json")
    assert [row["name"] for row in json.loads(out)] == [info.name for info in mmfast.methods()]


def test_methods_shows_one_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "methods", "pyramiddrop")
    assert status == 0
    assert "keep=0.125" in out
    assert "arXiv 2410.17247" in out
    assert json.loads(run(capsys, "methods", "fastv", "--json")[1])["options"]["layer"] == 2


def test_doctor_names_versions_readers_and_families(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["versions"]["mmfast"] == mmfast.__version__
    assert found["readers"]["pyav"].startswith("works")
    assert found["families"]["llava"] == "works"
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "qwen2_5_vl" in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.mp4", "cut.mp4"),
        ("text.mp4", "text.mp4: text"),
        ("empty.mp4", "empty.mp4"),
        ("thin.png", "extreme aspect ratio"),
        ("huge.png", "30000x30000 pixels"),
        ("missing.png", "no such file"),
    ],
)
def test_bad_media_gives_one_line(capsys: pytest.CaptureFixture[str], media: Path, name: str, message: str) -> None:
    status, out, err = run(capsys, "ask", str(media / name), "what is it?")
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--plan", "divprun()"), "unknown method 'divprun'; did you mean divprune"),
        (("--plan", "divprune(keep=0)"), "keep=0 must be at least 1"),
        (("--plan", "divprune(keep=1.5)"), "keep=1.5 must lie in (0, 1]"),
        (("--plan", "nowhere.toml"), "plan file 'nowhere.toml' does not exist"),
        (("--frames", "0"), "--frames=0 must be at least 1"),
        (("--frames", "x"), "invalid int value: 'x'"),
    ],
)
def test_misuse_gives_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    status, out, err = run(capsys, "ask", SCENE, "what?", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_plan_the_model_cannot_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "ask", SCENE, "what?", "--plan", "fastv(layer=9)")
    assert status == 2
    assert "must lie in 1..3 for a model of 4 layers" in err.splitlines()[-1]


def test_an_unknown_model_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(capsys, "ask", SCENE, "what?", "--model", str(tmp_path / "nowhere"))
    assert status == 2
    assert "nowhere" in err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="unknown method"):
        main(["methods", "nope", "--debug"])


@pytest.mark.parametrize("words", [(), ("fly",), ("ask",), ("compare", SCENE, "q")])
def test_wrong_words_exit_with_2(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith("mmfast: ")
    assert err.count("\n") == 1


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"mmfast {mmfast.__version__}\n")
    assert "COMMAND" in run(capsys, "--help")[1]


def test_ctrl_c_exits_with_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmfast.cli.methods.get", interrupted)
    assert run(capsys, "methods", "fastv")[::2] == (130, "mmfast: interrupted\n")
