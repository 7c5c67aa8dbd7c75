"""Result files: what a killed process leaves behind, what does not fit, and merging."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmfast.eval.records import Header, Record
from mmfast.eval.results import ResultsFile, file_name, merge, read_results

HEADER = Header("toy", 1, {"split": "test"}, "accuracy", 0.0, "full", "tiny", "abc", "float32", 8, 1, 4)


def record(name: str, score: float = 1.0, error: str = "") -> Record:
    return Record(name, "toy", f" raw text of {name}\n", "parsed", ("ä", "b"), score, error=error)


def written(path: Path, *records: Record, header: Header = HEADER) -> Path:
    with ResultsFile(path, header) as file:
        for item in records:
            file.append(item)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "new" / "a.jsonl", record("q1"), record("q2", 0.5))
    assert read_results(path) == (HEADER, [record("q1"), record("q2", 0.5)])


def test_a_record_is_on_disk_before_the_next(tmp_path: Path) -> None:
    with ResultsFile(tmp_path / "a.jsonl", HEADER) as file:
        file.append(record("q1"))
        assert len(read_results(file.path)[1]) == 1


_WRITER = """
import sys
from pathlib import Path
from mmfast.eval.records import Header, Record
from mmfast.eval.results import ResultsFile
header = Header("toy", 1, {"split": "test"}, "accuracy", 0.0, "full", "tiny", "abc", "float32", 8, 1, 4)
with ResultsFile(Path(sys.argv[1]), header) as file:
    file.append(Record("q1", "toy", "red", "red", ("red",), 1.0))
    print("written", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="this system does not tell writers apart")
    path = tmp_path / "a.jsonl"
    words = [sys.executable, "-c", _WRITER, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "written\n"
            before = path.read_bytes()
            with pytest.raises(BlockingIOError, match=r"a\.jsonl is being written by another run.*--shard 0/2"):
                ResultsFile(path, HEADER)
            assert path.read_bytes() == before
            # Another shard is another file, and reading disturbs nobody.
            written(tmp_path / "b.jsonl", record("q2"))
            assert [len(run.records) for run in merge([tmp_path])] == [2]
        finally:
            other.kill()
    # It had no time to tidy up.
    with ResultsFile(path, HEADER) as file:
        assert file.finished == {"q1"}
        with pytest.raises(BlockingIOError):
            ResultsFile(path, HEADER)


def test_a_file_that_does_not_fit_is_let_go(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", record("q1"))
    with pytest.raises(ValueError, match="do not fit"):
        ResultsFile(path, replace(HEADER, weights="other"))
    assert ResultsFile(path, HEADER).finished == {"q1"}


def test_a_file_cut_anywhere_goes_on(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.jsonl", record("q1"), record("q2")).read_bytes()
    complete = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    # Around the end of every line, and here and there inside.
    for end in sorted({0, *range(5, len(whole), 101), *(length + step for length in complete for step in (-2, -1, 0))}):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:end])
        left = max(0, sum(length <= end for length in complete) - 1)
        with ResultsFile(path, HEADER) as file:
            assert len(file.finished) == left
            file.append(record("q3"))
        assert [item.question_id for item in read_results(path)[1]] == [*["q1", "q2"][:left], "q3"]


def test_a_last_line_of_garbage_is_dropped(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", record("q1"))
    path.write_bytes(path.read_bytes() + b"\0\0\0\0\n")
    with ResultsFile(path, HEADER) as file:
        file.append(record("q2"))
    assert [item.question_id for item in read_results(path)[1]] == ["q1", "q2"]


def test_garbage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", record("q1"), record("q2"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:30], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: "):
        read_results(path)


def test_a_line_that_is_no_record_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + '{"question_id": "q1"}\n')
    with pytest.raises(ValueError, match=r"line 2: .*missing.*no line of a results file"):
        read_results(path)


def test_another_format_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", header=replace(HEADER, format=99))
    with pytest.raises(ValueError, match="reads result files of format 1, got 99"):
        read_results(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "other"),
        ("dtype", "float16"),
        ("task_version", 2),
        ("task_options", {"split": "train"}),
        ("plan", "uniform(keep=4)"),
        ("max_new_tokens", 9),
        ("batch", 2),
    ],
)
def test_a_header_that_does_not_fit_says_what_differs(tmp_path: Path, field: str, value: object) -> None:
    path = written(tmp_path / "a.jsonl", record("q1"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{field}: .* there, {re.escape(repr(value))} now.*another folder"):
        ResultsFile(path, replace(HEADER, **{field: value}))
    assert path.read_bytes() == before


def test_another_machine_or_date_fits(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", record("q1"))
    other = replace(HEADER, hardware={"device": "other"}, versions={"torch": "9"}, created="later", limit=7)
    with ResultsFile(path, other) as file:
        assert file.finished == {"q1"}


def test_answers_that_are_no_list_are_named_by_line(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", record("q1"))
    path.write_text(path.read_text(encoding="utf-8").replace('["ä", "b"]', "null"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .* this is no line of a results file"):
        read_results(path)


def test_failed_samples_are_finished_unless_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", record("q1"), record("q2", 0.0, "out of memory"))
    with ResultsFile(path, HEADER) as file:
        assert file.finished == {"q1", "q2"}
    with ResultsFile(path, HEADER, retry_failed=True) as file:
        assert file.finished == {"q1"}
        file.append(record("q2"))
    (run,) = merge([path])
    assert [(item.question_id, item.error) for item in run.records] == [("q1", ""), ("q2", "")]


def test_merging_takes_every_sample_once(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", record("q1"), record("q3", 0.25))
    written(tmp_path / "b.jsonl", record("q2"), record("q3", 0.75))
    written(tmp_path / "other.jsonl", record("q1"), header=replace(HEADER, plan="uniform(keep=4)"))
    (tmp_path / "just-begun.jsonl").write_text("")
    runs = merge([tmp_path, tmp_path / "a.jsonl"])
    assert [(run.header.plan, len(run.records)) for run in runs] == [("full", 3), ("uniform(keep=4)", 1)]
    assert [item.score for item in runs[0].records] == [1.0, 1.0, 0.25]


def test_merging_refuses_what_does_not_fit(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl")
    written(tmp_path / "b.jsonl", header=replace(HEADER, weights="other"))
    with pytest.raises(ValueError, match=r"a\.jsonl and .*b\.jsonl do not fit.*weights: 'abc' there, 'other' now"):
        merge([tmp_path])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        merge([tmp_path / "nowhere"])


def test_names_of_files_differ_where_plans_do() -> None:
    plans = ["a(x='+')", "a(x='-')", "a(x=' ')", "a" * 300, "a" * 301]
    names = {file_name("t", plan, "org/model", shard) for plan in plans for shard in ((0, 2), (1, 2), (0, 1))}
    assert len(names) == 15
    assert all(len(name) < 200 and "/" not in name for name in names)
