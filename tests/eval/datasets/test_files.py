"""Reading files of records: what is read, and where errors point."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmfast.eval.datasets import files
from mmfast.eval.datasets.files import Row


def png(size: tuple[int, int] = (3, 2)) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", size, "red").save(target, "PNG")
    return target.getvalue()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"q": "what, where?", "n": "1"}, {"q": "tab\\there", "n": "2"}]'),
        ("a.jsonl", '{"q": "what, where?", "n": "1"}\n\n{"q": "tab\\there", "n": "2"}\n'),
        ("a.csv", 'q,n\n"what, where?",1\n"tab\there",2\n'),
        ("a.tsv", 'q\tn\nwhat, where?\t1\n"tab\there"\t2\n'),
    ],
)
def test_same_records_whatever_the_format(tmp_path: Path, name: str, text: str) -> None:
    found = [row.values for row in files.rows(write(tmp_path / name, text))]
    assert found == [{"q": "what, where?", "n": "1"}, {"q": "tab\there", "n": "2"}]


def test_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    (row,) = files.table_rows(write(tmp_path / "a.csv", "\ufeffq,n\nx,\n"))
    assert dict(row.values) == {"q": "x", "n": None}


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.json", '[\n{"q": 1},\n{"q": }\n]', "a.json:3: no JSON"),
        ("a.json", '[{"q": 1}, 7]', "a.json, record 2: int; must be an object"),
        ("a.json", '{"q": 1}', "a.json: dict; must be a list"),
        ("a.json", "[" * 100_000, "a.json: nested too deeply"),
        ("a.jsonl", '{"q": 1}\n\n{"q": \n', "a.jsonl:3: no JSON"),
        ("a.jsonl", '{"q": 1}\n[]\n', "a.jsonl:2: list; must be an object"),
        ("a.csv", "q,n\nx,1\ny\n", "a.csv:3: 1 cells; the header has 2"),
        ("a.csv", 'q,n\nx,"1\n', "a.csv:2:"),
        ("a.tsv", "q\tq\nx\t1\n", "a.tsv:1: the header is empty or names a column twice"),
        ("a.csv", "", "a.csv:1: the header is empty"),
        ("a.xml", "<a/>", "a.xml: suffix '.xml'; must be .json"),
    ],
)
def test_error_names_the_place(tmp_path: Path, name: str, text: str, where: str) -> None:
    with pytest.raises(ValueError) as error:
        list(files.rows(write(tmp_path / name, text)))
    assert where in str(error.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_text_that_is_no_utf8_names_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'[{"q": "\xff"}]')
    with pytest.raises(ValueError, match=rf"{name}(:1)?: no UTF-8"):
        list(files.rows(tmp_path / name))


def test_long_lines_and_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_CHARACTERS", 40)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 40)
    long = "x" * 50
    with pytest.raises(ValueError, match=r"a.jsonl:2: longer than 40"):
        list(files.rows(write(tmp_path / "a.jsonl", f'{{"q": 1}}\n{{"q": "{long}"}}\n')))
    with pytest.raises(ValueError, match=r"a.csv:2: .*limit"):
        list(files.rows(write(tmp_path / "a.csv", f"q\n{long}\n")))
    with pytest.raises(ValueError, match=r"a.json: \d+ bytes"):
        list(files.rows(write(tmp_path / "a.json", json.dumps([{"q": long}]))))


def test_limit_of_the_csv_module_is_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (row,) = files.table_rows(write(tmp_path / "a.tsv", f"q\n{'x' * (before + 1)}\n"), "\t")
    assert len(row.text("q")) == before + 1
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("call", "values", "problem"),
    [
        (lambda row: row.get("b"), {"a": 1}, "no field 'b'; there are a"),
        (lambda row: row.text("a"), {"a": None}, "a is missing"),
        (lambda row: row.text("a"), {"a": float("nan")}, "a is missing"),
        (lambda row: row.text("a"), {"a": ["x"]}, "a is list; it must be text"),
        (lambda row: row.text("a"), {"a": True}, "a is bool; it must be text"),
        (lambda row: row.texts("a"), {"a": ["x", 1]}, "a must be a list of texts"),
        (lambda row: row.integer("a", 0, 5), {"a": "6"}, "a is '6'; it must be a whole number from 0 to 5"),
        (lambda row: row.integer("a", 0, 5), {"a": 1.5}, "whole number"),
        (lambda row: row.integer("a", 0, 5), {"a": None}, "whole number"),
        (lambda row: row.integer("a", 0, 5), {"a": True}, "whole number"),
        (lambda row: row.integer("a", 0, 5), {"a": float("inf")}, "whole number"),
        (lambda row: row.seconds("a"), {"a": -1}, "a time in seconds"),
        (lambda row: row.seconds("a"), {"a": "soon"}, "a time in seconds"),
        (lambda row: row.numbers("a", 2), {"a": [1]}, "a list of 2 numbers"),
        (lambda row: row.numbers("a", 2), {"a": [1, float("nan")]}, "a list of 2 numbers"),
        (lambda row: row.choice("a", ("yes", "no")), {"a": "maybe"}, "one of yes, no"),
        (lambda row: row.records("a"), {"a": [1]}, "a, record 1: int; must be an object"),
        (lambda row: row.image("a", Path()), {"a": None}, "a is NoneType; it must be an image"),
        (lambda row: row.image("a", Path()), {"a": b"no picture"}, "a: "),
        (lambda row: row.base64_image("a"), {"a": "%%%"}, "a is no base64"),
        (lambda row: row.base64_image("a"), {"a": "aGVsbG8gd29ybGQ="}, "a: "),
    ],
)
def test_bad_fields_name_place_and_field(call: Any, values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as error:
        call(Row("a.json, record 3", values))
    assert str(error.value).startswith("a.json, record 3")
    assert problem in str(error.value)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "..\\secret.png"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    with pytest.raises(ValueError, match="leads out of"):
        Row("a.json, record 1", {"image": name}).image("image", tmp_path / "data")


def test_missing_picture_names_record_and_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"record 1: there is no file .*x.png or .*y.png"):
        Row("a.json, record 1", {}).file(tmp_path, "x.png", "y.png")


def test_pictures_as_exports_hold_them(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png())
    assert Row("", {"image": "x.png"}).image("image", tmp_path) == tmp_path / "x.png"
    held = [{"bytes": png(), "path": None}, png(), Image.new("L", (3, 2))]
    for value in held:
        picture = Row("", {"image": value}).image("image", tmp_path)
        assert isinstance(picture, Image.Image)
        assert (picture.size, picture.mode) == ((3, 2), "RGB")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [{"id": number, "image": {"bytes": png(), "path": "x.png"}, "tags": ["a"]} for number in range(40)]
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet")
    found = list(files.rows(tmp_path / "a.parquet"))
    assert [row.integer("id", 0, 39) for row in found] == list(range(40))
    assert found[39].place.endswith("a.parquet, record 40")
    assert found[0].texts("tags") == ("a",)
    assert found[0].image("image", tmp_path).size == (3, 2)
    write(tmp_path / "b.parquet", "nothing")
    with pytest.raises(ValueError, match=r"b.parquet: no readable parquet"):
        list(files.rows(tmp_path / "b.parquet"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write(tmp_path / "a.parquet", "")
    with pytest.raises(ImportError, match=r"mmfast\[eval\]"):
        list(files.rows(tmp_path / "a.parquet"))
