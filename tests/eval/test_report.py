"""The page of an evaluation: its figures, its charts, and the questions lost and won."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmfast.cli import main
from mmfast.eval.charts import HEIGHT, WIDTH, Point, pareto_front, scatter
from mmfast.eval.differences import MOST
from mmfast.eval.report import write_report
from support.pages import Tags, assert_self_contained
from support.result_files import records, write


def page_of(folder: Path) -> tuple[str, Tags]:
    out = folder / "page.html"
    write_report(out, [folder])
    content = out.read_text()
    return content, assert_self_contained(content)


def cells(content: str, plan: str) -> dict[str, str]:
    """Return the cells of a plan's row by the names of their columns, without marks."""
    (row,) = (found for found in re.findall(r"<tr.*?</tr>", content) if f"</b><code>{plan}</code>" in found)
    found = re.findall(r'<td data-label="([^"]*)"><span>(.*?)</span></td>', row)
    return {name: re.sub("<[^>]+>", "", value) for name, value in found}


def test_the_table_holds_the_figures(tmp_path: Path) -> None:
    write(tmp_path, "full", records([1] * 40))
    write(tmp_path, "divprune(keep=64)", records([1] * 20 + [0] * 20, tokens=64, ttft=50.0))
    write(tmp_path, "fastv(keep=0.5)", records([1] * 39 + [0], tokens=128, ttft=70.0))
    content, _ = page_of(tmp_path)
    lost = cells(content, "divprune(keep=64)")
    assert lost["score"].startswith("50.0 ")
    assert (lost["of full"], lost["tokens"], lost["per layer"]) == ("50.0 %", "64", "64.0")
    assert (lost["TTFT ms"], lost["tokens/s"], lost["GFLOP"], lost["KV MB"]) == ("50.0", "50", "1.000", "1.00")
    assert lost["against full"].startswith("-50.0 worse")
    assert "McNemar p &lt; 0.001" in lost["against full"]
    assert cells(content, "fastv(keep=0.5)")["against full"].startswith("-2.5 no difference shown")
    assert cells(content, "full")["against full"] == "-"
    # What nobody measured has no column.
    assert "peak MB" not in lost


def test_questions_lost_and_won_are_listed_with_both_answers(tmp_path: Path) -> None:
    write(tmp_path, "full", records([1, 0, 1, 0.5]))
    write(tmp_path, "divprune(keep=64)", records([0, 1, 1, 0.75]))
    write(tmp_path, "uniform(keep=64)", records([0, 0, 0, 0]))
    content, tags = page_of(tmp_path)
    assert "<code>divprune(keep=64)</code>: lost 1, won 2, same score on 1" in content
    rows = re.findall(r'<tr class="(lost|won)">(.*?)</tr>', content)
    shown = [(kind, re.findall(r"<span>(.*?)</span></td>", row)[1:5]) for kind, row in rows]
    assert shown == [
        ("lost", ["question 0?", "truth", "said 1", "said 0"]),
        ("won", ["question 1?", "truth", "said 0", "said 1"]),
        (
            "won",
            ["question 3?", "truth", "said 0.5 <small>score 0.50</small>", "said 0.75 <small>score 0.75</small>"],
        ),
    ]
    # Baselines are measured, not read through.
    assert "<code>uniform(keep=64)</code>: lost" not in content
    # The script shows what it alone can work.
    (filters,) = (found for found in tags.named("div") if found.get("class") == "filter screen")
    assert "hidden" in filters


def test_failures_are_counted_by_what_went_wrong(tmp_path: Path) -> None:
    write(tmp_path, "full", records([1, 1, 1]))
    broken = records([0, 0], error="the picture is empty", prediction="") + records([1, 1, 1])[2:]
    write(tmp_path, "divprune(keep=64)", broken)
    content, _ = page_of(tmp_path)
    assert "Failed questions: 2" in content
    assert re.search(r"<span>2</span>.*<code>divprune\(keep=64\)</code>.*the picture is empty", content)
    assert "2 failed" in cells(content, "divprune(keep=64)")["n"]
    assert content.count("failed: the picture is empty") == 2


def test_no_failure_is_said_too(tmp_path: Path) -> None:
    write(tmp_path, "full", records([1]))
    assert "No question failed." in page_of(tmp_path)[0]


def test_everything_foreign_is_escaped(tmp_path: Path) -> None:
    evil = "</table></script><script>alert('x')</script><img src=x onerror=alert(1)>\"&"
    foreign = {"question": evil, "category": evil, "choices": (evil, evil)}
    write(tmp_path, "full", records([1, 1], **foreign, prediction=evil, answers=(evil,)), model=evil, metric=evil)
    worse = records([0, 0], **foreign, prediction=evil, error=evil, answers=(evil,))
    write(tmp_path, "divprune(keep=64)", worse, model=evil, metric=evil, hardware={"device": evil})
    content, tags = page_of(tmp_path)
    assert not tags.named("img")
    assert "alert('x')" not in content
    assert content.count("&lt;script&gt;alert(&#x27;x&#x27;)") > 10


def test_long_lists_and_texts_are_cut_and_it_is_said(tmp_path: Path) -> None:
    count = MOST + 25
    write(tmp_path, "full", records([1] * count, question="x" * 5000))
    write(tmp_path, "divprune(keep=64)", records([0] * count, question="x" * 5000))
    content, _ = page_of(tmp_path)
    assert content.count('<tr class="lost">') == MOST
    assert "25 more are in the results files." in content
    assert "x" * 601 not in content


def test_tasks_have_a_part_each(tmp_path: Path) -> None:
    for task in ("mine", "yours"):
        write(tmp_path, "full", records([1]), task=task)
    _, tags = page_of(tmp_path)
    anchors = [str(link["href"]) for link in tags.named("a")]
    assert anchors == ["#part-0", "#part-1"]
    assert [found["id"] for found in tags.named("section") if "id" in found] == ["part-0", "part-1"]


def test_without_times_the_whole_answer_is_charted(tmp_path: Path) -> None:
    write(tmp_path, "full", records([1, 0], ttft=None, e2e_ms=5.0))
    content, tags = page_of(tmp_path)
    assert "whole answer, ms, median" in content
    assert "time to first token, ms, median" not in content
    assert len([svg for svg in tags.named("svg") if svg.get("role") == "img"]) == 2


def at(x: float, y: float, number: str = "", kind: str = "") -> Point:
    return Point(number, f"{x} {y}", kind, x, y, y - 1, y + 1)


def test_the_front_is_what_nothing_beats() -> None:
    points = [at(3, 60), at(1, 50), at(2, 50), at(2, 80), at(4, 80), at(5, 90), at(1, 40)]
    assert [(point.x, point.y) for point in pareto_front(points)] == [(1, 50), (2, 80), (5, 90)]


@pytest.mark.parametrize("logarithmic", [False, True])
def test_points_lie_inside_the_chart_in_the_order_of_their_values(logarithmic: bool) -> None:
    points = [at(16, 20, "1"), at(64, 60, "2"), at(256, 95, "3")]
    tags = Tags(scatter(points, "cost", "score", logarithmic=logarithmic))
    marks = [(float(str(mark["cx"])), float(str(mark["cy"]))) for mark in tags.named("circle")]
    assert [x for x, _ in marks] == sorted(x for x, _ in marks)
    assert [y for _, y in marks] == sorted((y for _, y in marks), reverse=True)
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in marks)
    if logarithmic:
        assert marks[1][0] - marks[0][0] == pytest.approx(marks[2][0] - marks[1][0], abs=0.2)


@pytest.mark.parametrize("points", [[at(5, 50, "1")], [at(5, 50, "1"), at(5, 50, "2")], [at(0, 0), at(0, 100)]])
def test_a_chart_of_equal_values_has_ticks(points: list[Point]) -> None:
    tags = Tags(scatter(points, "cost", "score"))
    assert len([path for path in tags.named("path") if path["class"] == "grid"]) >= 4
    assert "nan" not in str(tags.found)


def test_no_chart_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one point"):
        scatter([], "cost", "score")
    with pytest.raises(ValueError, match="costs above 0"):
        scatter([at(0, 1)], "cost", "score", logarithmic=True)


def test_numbers_of_neighbours_do_not_cover_each_other() -> None:
    tags = Tags(scatter([at(100 + step, 50 + step / 10, str(step)) for step in range(4)], "cost", "score"))
    numbers = [text for text in tags.named("text") if text.get("class") == "number"]
    places = [(float(str(text["x"])), float(str(text["y"]))) for text in numbers]
    apart = [
        abs(one[0] - other[0]) >= 16 or abs(one[1] - other[1]) >= 12
        for place, one in enumerate(places)
        for other in places[place + 1 :]
    ]
    assert len(numbers) == 4
    assert all(apart)


def test_the_command_writes_the_page_from_results_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write(tmp_path / "results", "full", records([1, 0]))
    out = tmp_path / "page.html"
    assert main(["eval", "--show", "--out", str(tmp_path / "results"), "--report", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"wrote {out}\n"
    assert "mine on tiny" in captured.out
    assert cells(out.read_text(), "full")["score"].startswith("50.0 ")


def test_the_command_writes_the_page_of_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    words = ("--task", "shapes-image", "--limit", "2", "--plan", "uniform(keep=8)", "--no-baselines", "--device", "cpu")
    assert main(["eval", *words, "--out", str(tmp_path / "results"), "--report", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().err
    content = out.read_text()
    assert_self_contained(content)
    assert cells(content, "uniform(keep=8)")["tokens"] == "8"


@pytest.mark.parametrize(
    ("name", "message"),
    [("page.pdf", "must end in .html"), ("nowhere/page.html", "its folder does not exist"), ("", "must end in .html")],
)
def test_a_page_that_cannot_be_written_is_refused_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, message: str
) -> None:
    assert main(["eval", "--task", "shapes-image", "--out", str(tmp_path / "r"), "--report", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_page_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results to show yet"):
        write_report(tmp_path / "page.html", [tmp_path])
    assert not (tmp_path / "page.html").exists()
