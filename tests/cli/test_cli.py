"""Every sub-command through main(): output, exit status and errors."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmfast
from mmfast.cli import common, main
from mmfast.media import sample

SCENE = str(sample("scenes/scene_0.png"))
QUICK = ("--repeats", "1", "--max-new-tokens", "4", "--frames", "2")


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
    assert "process peak so far" in out
    assert "knows coloured shapes and short text, nothing else" in err


def test_ask_takes_images_and_a_video(capsys: pytest.CaptureFixture[str], media: Path) -> None:
    words = ("ask", str(media / "grey.png"), str(media / "clip.mp4"), "what color is the ring?")
    status, out, _ = run(capsys, *words, "--frames", "2", "--json")
    assert status == 0
    assert [item["tokens"] for item in json.loads(out)["report"]["media"]] == [256, 256, 256]


def test_ask_prints_json(capsys: pytest.CaptureFixture[str], media: Path) -> None:
    status, out, _ = run(capsys, "ask", str(media / "clip.mp4"), "what color is the ring?", "--frames", "2", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["answer"] == "orange"
    assert found["report"]["plan"] == "full"
    assert [item["tokens"] for item in found["report"]["media"]] == [256, 256]


def test_ask_says_when_a_clip_has_fewer_frames(capsys: pytest.CaptureFixture[str], media: Path) -> None:
    _, _, err = run(capsys, "ask", str(media / "clip.mp4"), "what?", "--frames", "9", "--max-new-tokens", "1")
    assert "note: num_frames=9, but there are only 8 frames" in err


def test_compare_shows_every_plan(capsys: pytest.CaptureFixture[str], media: Path) -> None:
    plans = ("--plan", "divprune(keep=64)", "--plan", "divprune(keep=128) + pyramiddrop()")
    status, out, _ = run(capsys, "compare", str(media / "clip.mp4"), "what color is the ring?", *QUICK, *plans)
    assert status == 0
    header = next(line for line in out.splitlines() if "divprune" in line)
    assert header.strip().split(maxsplit=2) == ["full", "divprune(keep=64)", "divprune(keep=128) + pyramiddrop()"]
    assert re.search(r"visual tokens into the LLM +512 +128 +\(25%\) +256 +\(50%\)", out)
    assert out.count("to the first token, ") + out.count("SLOWER than the untouched model") == 2
    assert "Baseline: sdpa attention, float32, cpu" in out
    assert "peak memory" not in out
    assert "Process peak so far" in out


def test_compare_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    text, answer = question()
    plan = "uniform(keep=64)"
    status, out, _ = run(capsys, "compare", SCENE, text, "--plan", plan, *QUICK, "--json")
    found = json.loads(out)
    full, uniform = found["runs"]
    assert status == 0
    assert (full["plan"], full["answer"], full["agreement"]) == ("full", answer, 1.0)
    assert uniform["report"]["entered_tokens"] == 64
    assert uniform["report"]["kv_bytes"] < full["report"]["kv_bytes"]
    assert full["report"]["kv_bytes"] == full["report"]["full_kv_bytes"]
    assert uniform["report"]["flops"] < full["report"]["flops"] == full["report"]["full_flops"]
    assert len(found["verdicts"]) == 1
    assert found["versions"]["mmfast"] == mmfast.__version__


def test_on_a_cpu_no_plan_is_given_a_peak_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "compare", SCENE, "what?", "--plan", "uniform(keep=64)", *QUICK, "--json")[1])
    assert found["process_peak_bytes"] > 0
    assert not any("peak_bytes" in run or "peak_bytes" in run["report"] for run in found["runs"])


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = run(capsys, "methods")
    assert status == 0
    columns = ("method", "stage", "action", "needs", "positions", "later turns", "training", "vectors")
    for column in (*columns, "paper", "summary"):
        assert column in out
    for info in mmfast.methods():
        rows = [line for line in out.splitlines() if line.split()[:1] == [info.name]]
        assert all(text in " ".join(rows) for text in (info.stage, info.action, info.turns, info.paper))
    rows = json.loads(run(capsys, "methods", "--json")[1])["methods"]
    assert [row["name"] for row in rows] == [info.name for info in mmfast.methods()]


def test_methods_shows_one_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "methods", "pyramiddrop")
    assert status == 0
    assert re.search(r"keep +0\.46875\n", out)
    assert "arXiv 2410.17247" in out
    assert "kind" not in out.partition("options and their defaults")[2]
    options = json.loads(run(capsys, "methods", "fastv", "--json")[1])["options"]
    assert options["layer"] == 2
    assert set(options) == set(mmfast.Plan.parse("fastv()").methods[0].options())


def test_the_example_of_every_method_is_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    for info in mmfast.methods():
        _, out, _ = run(capsys, "methods", info.name)
        (plan,) = re.findall(r'--plan "(.+)"$', out, re.MULTILINE)
        assert mmfast.Plan.parse(plan).methods[0].name == info.name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.mp4", "cut.mp4"),
        ("text.mp4", "text.mp4: text"),
        ("empty.mp4", "empty.mp4"),
        ("frameless.mp4", "frameless.mp4"),
        ("thin.png", "extreme aspect ratio"),
        ("huge.png", "30000x30000 pixels"),
        ("missing.png", "no such file"),
        ("\x1b[31m.png", "?[31m.png: no such file"),
    ],
)
@pytest.mark.parametrize("command", [("ask",), ("compare", "--plan", "divprune()")], ids=lambda words: words[0])
def test_bad_media_gives_one_line(
    capsys: pytest.CaptureFixture[str], media: Path, command: tuple[str, ...], name: str, message: str
) -> None:
    status, out, err = run(capsys, command[0], str(media / name), "what is it?", *command[1:])
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert err.endswith("(--debug shows the traceback)\n")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--plan", "divprun()"), "unknown method 'divprun'; did you mean divprune"),
        (("--plan", "divprune(keep=0)"), "keep=0 must be at least 1"),
        (("--plan", "divprune(keep=1.5)"), "keep=1.5 must lie in (0, 1]"),
        (("--plan", "divprune(keep=True)"), "keep=True must be a count"),
        (("--plan", "fastv(kind='x')"), "has no option 'kind'"),
        (("--plan", "nowhere.toml"), "plan file 'nowhere.toml' does not exist"),
        (("--frames", "0"), "--frames=0 must be at least 1"),
        (("--max-new-tokens", "-1"), "--max-new-tokens=-1 must be at least 1"),
        (("--frames", "x"), "invalid int value: 'x'"),
        (("--device", "gpu"), "--device=gpu is no device"),
        (("--device", "cuda:99"), "--device=cuda:99: torch sees"),
        (("--dtype", "int4"), "invalid choice: 'int4'"),
    ],
)
def test_misuse_gives_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    status, out, err = run(capsys, "ask", SCENE, "what?", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--repeats", "0"), "--repeats=0 must be at least 1"),
        (("--out", "page.pdf"), "must end in .html"),
        (("--out", "nowhere/page.html"), "its folder does not exist"),
    ],
)
def test_misuse_of_compare_is_seen_before_anything_runs(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    status, out, err = run(capsys, "compare", SCENE, "what?", "--plan", "divprune()", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_two_videos_are_refused(capsys: pytest.CaptureFixture[str], media: Path) -> None:
    clip = str(media / "clip.mp4")
    status, _, err = run(capsys, "ask", clip, clip, "what?")
    assert status == 2
    assert err.startswith("mmfast: 2 videos were given; a prompt takes one")


def test_the_model_with_compression_tokens_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "ask", SCENE, "what color is it?", "--model", "embedded-voco", "--plan", "voco()")
    assert status == 0
    assert "plan     voco(" in out


def test_a_plan_the_model_cannot_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "ask", SCENE, "what?", "--plan", "fastv(layer=9)")
    assert status == 2
    assert "must lie in 1..7 for a model of 8 layers" in err.splitlines()[-1]


def test_an_unknown_folder_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(capsys, "ask", SCENE, "what?", "--model", str(tmp_path / "nowhere"))
    assert status == 2
    assert "nowhere' is neither a folder nor a model id" in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="unknown method"):
        main(["methods", "nope", "--debug"])


@pytest.mark.parametrize("words", [(), ("fly",), ("ask",), ("ask", SCENE), ("compare", SCENE, "q")])
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

    monkeypatch.setattr("mmfast.registry.get", interrupted)
    assert run(capsys, "methods", "fastv")[::2] == (130, "mmfast: interrupted\n")


def test_what_nobody_foresaw_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("mmfast.registry.get", broken)
    line = "mmfast: unexpected RuntimeError: out of memory (--debug shows the traceback)\n"
    assert run(capsys, "methods", "fastv") == (1, "", line)


def script(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the console script as a user does, in a process of its own."""
    code = (
        "import os, sys; os.environ.update(dict(pair.split('=', 1) for pair in sys.argv.pop(1).split(';') if pair))\n"
    )
    code += "from mmfast.cli import main; sys.exit(main())"
    pairs = ";".join(f"{name}={value}" for name, value in environment.items())
    return subprocess.run([sys.executable, "-c", code, pairs, *words], capture_output=True, text=True)


def test_an_unknown_model_id_is_named() -> None:
    done = script("ask", SCENE, "what?", "--model", "nobody/nothing", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "'nobody/nothing' cannot be fetched" in done.stderr
    assert done.stderr.count("\n") == 1


def test_version_waits_for_no_library() -> None:
    code = """
import sys
from mmfast.cli import common, main
main(["--version"])
print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"mmfast {mmfast.__version__}", "[]"]


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"set -o pipefail; '{sys.executable}' -c 'import mmfast.cli, sys; sys.exit(mmfast.cli.main())'"
    done = subprocess.run(["bash", "-c", f"{command} methods --json | true"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class Screen(io.StringIO):
    """A stream that somebody may watch."""

    def __init__(self, watched: bool) -> None:
        super().__init__()
        self.watched = watched

    def isatty(self) -> bool:
        return self.watched


@pytest.mark.parametrize("watched", [True, False])
def test_a_bar_is_drawn_where_somebody_watches(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(watched)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with common.bar("preparing") as move:
        move(description="task, plan(layers=[red])", completed=1, total=4)
        move(advance=2)
    assert ("3/4" in screen.getvalue(), "task, plan(layers=[red])" in screen.getvalue()) == (watched, watched)
    assert watched or screen.getvalue() == ""
