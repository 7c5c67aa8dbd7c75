"""Options of tasks: from the command line into the header of the results, and asking failed questions again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
from PIL import Image

from mmfast.cli import main
from mmfast.cli.task_options import read_options
from mmfast.eval import Sample, evaluate
from mmfast.eval.datasets import task
from mmfast.eval.records import Header, Record
from mmfast.eval.results import ResultsFile, merge, read_results
from mmfast.eval.runner import task_options
from mmfast.eval.task import Media, Task
from support.toy_task import Toy


def test_values_have_the_type_of_their_field() -> None:
    words = ["shapes-image.num_questions=7", "shapes-image.families=color, size", "pope.root=/data=1/pope"]
    words += ["pope.limit=none", "pope.limit=3", "textvqa.ocr=TRUE", "msvd-qa.replies=none"]
    names = ["shapes-image", "pope", "textvqa", "msvd-qa"]
    assert read_options(words[:-2], names) == {
        "shapes-image": {"num_questions": 7, "families": ("color", "size")},
        "pope": {"root": Path("/data=1/pope"), "limit": 3},
    }
    assert read_options(["video-mme.subtitles=TRUE"], ["video-mme"]) == {"video-mme": {"subtitles": True}}
    assert read_options(["msvd-qa.judge=none"], ["msvd-qa"]) == {"msvd-qa": {"judge": None}}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("pope", "--set=pope must be TASK.FIELD=VALUE, for example pope.split=random"),
        ("pop.split=random", "'pop' is none of the tasks of this run; did you mean 'pope'?"),
        ("xyz.split=random", "'xyz' is none of the tasks of this run; these are pope, msvd-qa"),
        ("pope.limit=few", "limit of 'pope' must be a whole number or none"),
        ("msvd-qa.judge=gpt", "judge of 'msvd-qa' is an object of Python"),
    ],
)
def test_other_words_are_refused(word: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_options([word], ["pope", "msvd-qa"])
    assert message in str(caught.value)


def test_options_reach_the_header(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["eval", "--task", "shapes-image", "--no-baselines", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*words, "--set", "shapes-image.num_questions=2", "--set", "shapes-image.seed=5"]) == 0
    (path,) = tmp_path.glob("*.jsonl")
    header, records = read_results(path)
    assert (header.task_options["num_questions"], header.task_options["seed"], len(records)) == (2, 5, 2)
    assert header.task_version == task("shapes-image").version == type(task("shapes-image")).version
    capsys.readouterr()
    # Answers to other questions are not mixed in.
    assert main([*words, "--set", "shapes-image.num_questions=2", "--set", "shapes-image.seed=6"]) == 2
    assert "task_options" in capsys.readouterr().err
    assert main([*words, "--set", "shapes-image.num_question=2"]) == 2
    assert "has no option 'num_question'; did you mean 'num_questions'" in capsys.readouterr().err


def judge(request: Any, name: str = "") -> str:
    return name


class Judge:
    def __call__(self, request: Any) -> str:
        return ""


@dataclass(frozen=True)
class Judged(Toy):
    name: ClassVar[str] = "judged"

    judge: Callable[..., str] | None = None


@pytest.mark.parametrize(
    ("given", "name"),
    [(judge, "judge"), (partial(judge, name="a"), "judge"), (Judge(), "Judge"), (Judge().__call__, "Judge.__call__")],
)
def test_callables_are_known_by_their_name(given: Any, name: str) -> None:
    found = task_options(Judged(judge=given))["judge"]
    # Not by their address, with which no run could be resumed.
    assert found == f"{__name__}.{name}"
    assert json.loads(json.dumps(found)) == found


def test_answers_judged_elsewhere_are_shown_without_the_replies(tmp_path: Path, capsys: Any) -> None:
    judged = task("msvd-qa", scoring="judge", replies=tmp_path / "replies.jsonl")
    options = task_options(judged)
    # Where the file lies differs between machines; which one it is does not.
    assert (options["replies"], "root" in options) == ("replies.jsonl", False)
    header = Header("msvd-qa", 1, options, "accuracy", 0.0, "full", "tiny", "w", "float32", 16, 1, 8)
    with ResultsFile(tmp_path / "out" / "a.jsonl", header) as file:
        file.append(Record("q", "msvd-qa", "a cat", "yes", ("cat",), 1.0, scored_details={"judge_score": 4.0}))
    assert main(["eval", "--show", "--out", str(tmp_path / "out"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["score"], row["figures"]["judge_score"]) == (100.0, 4.0)


def test_a_task_is_of_version_one_until_it_says_otherwise(tiny: Any, tmp_path: Path) -> None:
    assert (Task.version, Toy.version) == (1, 1)
    assert "mixed" in get_args(Media)


def test_failed_questions_are_asked_again_when_wanted(tiny: Any, tmp_path: Path) -> None:
    picture = tmp_path / "late.png"
    samples = (
        Sample("late", "is it?", ("",), images=(picture,), details={"one": 1.0}),
        Sample("there", "is it?", ("",), images=(Image.new("RGB", (64, 64), "red"),), details={"one": 1.0}),
    )
    out, asked = tmp_path / "out", []

    def row(**options: Any) -> Any:
        return evaluate(*tiny, [Toy(samples)], [], out=out, progress=asked.append, **options).rows[0]

    assert (row().failed, len(asked)) == (1, 2)
    Image.new("RGB", (64, 64), "blue").save(picture)
    assert (row().failed, len(asked)) == (1, 2)
    assert (row(retry_failed=True).failed, len(asked)) == (0, 3)
    (run,) = merge([out])
    assert [(record.question_id, record.error) for record in run.records] == [("late", ""), ("there", "")]
    assert (row(retry_failed=True).n, len(asked)) == (2, 3)
