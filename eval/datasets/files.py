"""Reading what data sets are made of: JSON, JSONL, CSV, TSV, parquet and images, with errors that name the place.

Everything is a sequence of :class:`Row`, whatever it was written in. Files come from strangers: sizes are
capped, nothing is unpickled, and no name in a file leads out of the folder that the user gave.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from mmfast.media import MediaError, load_image

MAX_JSON_BYTES = 2 * 2**30
MAX_LINE_CHARACTERS = 64 * 2**20
"""A line of a table may hold an image in base64."""

_PARQUET_BATCH = 16


@dataclass(frozen=True)
class Row:
    """One record of a file.

    Attributes:
        place: file and line or record, for errors.
        values: its fields.
    """

    place: str
    values: Mapping[str, Any]

    def error(self, problem: str) -> ValueError:
        """Make an error that says where."""
        return ValueError(f"{self.place}: {problem}")

    def get(self, name: str) -> Any:
        """Return a field as it is.

        Raises:
            ValueError: if there is no such field.
        """
        if name not in self.values:
            known = ", ".join(map(str, self.values)) or "none"
            raise self.error(f"no field {name!r}; there are {known}")
        return self.values[name]

    def text(self, name: str, default: str | None = None) -> str:
        """Return a field as text; numbers are written out.

        Args:
            name: the field.
            default: what to return where it is missing, null or an empty cell; None makes that an error.

        Raises:
            ValueError: if it is missing and there is no default, or neither text nor a number.

        Example:
            >>> Row("a.json, record 3", {"id": 7}).text("id")
            '7'
        """
        value = self.values.get(name)
        if value is None or (isinstance(value, float) and value != value):
            if default is None:
                raise self.error(f"{name} is missing or empty; it must be text")
            return default
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(f"{name} is {type(value).__name__}; it must be text")
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a field that is a list of texts.

        Raises:
            ValueError: if it is not.
        """
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.error(f"{name} must be a list of texts")
        return tuple(value)

    def integer(self, name: str, lowest: int, highest: int) -> int:
        """Return a field that is a whole number, or text that is one.

        Raises:
            ValueError: if it is not, or out of range.
        """
        value = self.get(name)
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            number = lowest - 1
        if isinstance(value, bool) or number != _as_float(value) or not lowest <= number <= highest:
            raise self.error(f"{name} is {value!r}; it must be a whole number from {lowest} to {highest}")
        return number

    def seconds(self, name: str) -> float | None:
        """Return a field that is a time in seconds, None where it is missing or null.

        Raises:
            ValueError: if it is no number, or below 0.
        """
        value = self.values.get(name)
        if value is None:
            return None
        if not 0 <= (number := _as_float(value)) < float("inf"):
            raise self.error(f"{name} is {value!r}; it must be a time in seconds")
        return number

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """Return a field that is a list of so many finite numbers.

        Raises:
            ValueError: if it is not.
        """
        value = self.get(name)
        found = tuple(map(_as_float, value)) if isinstance(value, list | tuple) else ()
        if len(found) != count or any(abs(number) == float("inf") or number != number for number in found):
            raise self.error(f"{name} is {value!r}; it must be a list of {count} numbers")
        return found

    def records(self, name: str) -> list[Row]:
        """Return a field that is a list of records.

        Raises:
            ValueError: if it is not.
        """
        return rows_of(self.get(name), f"{self.place}, {name}")

    def choice(self, name: str, allowed: Sequence[str]) -> str:
        """Return a text that must be one of a few.

        Raises:
            ValueError: if it is none of them.
        """
        value = self.text(name).strip()
        if value not in allowed:
            raise self.error(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        return value

    def image(self, name: str, folder: Path) -> Image.Image | Path:
        """Return an image that the record holds (as exports do) or names.

        Args:
            name: the field: bytes, ``{"bytes": ..., "path": ...}``, an opened image or a file name.
            folder: where named files lie.

        Raises:
            ValueError: if it is none of these, or cannot be decoded.
            FileNotFoundError: if the named file does not exist.
        """
        value = self.get(name)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:
            return self.file(folder, value)
        if not isinstance(value, bytes | Image.Image):
            raise self.error(f"{name} is {type(value).__name__}; it must be an image or the name of one")
        return self._decoded(name, value)

    def base64_image(self, name: str) -> Image.Image:
        """Decode an image that is written as base64.

        Raises:
            ValueError: if it cannot be decoded.
        """
        try:
            content = base64.b64decode(self.text(name), validate=True)
        except binascii.Error:
            raise self.error(f"{name} is no base64") from None
        return self._decoded(name, content)

    def _decoded(self, name: str, content: bytes | Image.Image) -> Image.Image:
        try:
            return load_image(content)
        except MediaError as error:
            raise self.error(f"{name}: {error}") from None

    def file(self, folder: Path, *names: str) -> Path:
        """Return the first of some files that exists.

        Args:
            folder: what they are named from.
            names: paths below it, with forward slashes.

        Raises:
            ValueError: if a name leads out of the folder.
            FileNotFoundError: if none exists.
        """
        for name in names:
            if (path := self.inside(folder, name)).is_file():
                return path
        raise FileNotFoundError(f"{self.place}: there is no file {' or '.join(str(folder / name) for name in names)}")

    def inside(self, folder: Path, name: str) -> Path:
        """Return where a file or folder that the record names would lie.

        Args:
            folder: what it is named from.
            name: a path below it, with forward slashes.

        Raises:
            ValueError: if the name leads out of the folder.
        """
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise self.error(f"{name!r} leads out of {folder}; names must be relative and without ..")
        return folder / path


def _as_float(value: object) -> float:
    try:
        return float(value) if isinstance(value, int | float | str) else float("nan")
    except (ValueError, OverflowError):
        return float("nan")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: naming file and line if it is no JSON, or the file if it is larger than 2 GiB.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {size} bytes; a JSON file may have at most {MAX_JSON_BYTES}, use JSONL or parquet")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: no JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None


def rows_of(value: object, place: str) -> list[Row]:
    """Number the records of a list.

    Raises:
        ValueError: if it is no list of objects.

    Example:
        >>> [row.place for row in rows_of([{"a": 1}, {"a": 2}], "a.json")]
        ['a.json, record 1', 'a.json, record 2']
    """
    if not isinstance(value, list):
        raise ValueError(f"{place}: {type(value).__name__}; must be a list of objects")
    return [_row(f"{place}, record {number}", entry) for number, entry in enumerate(value, start=1)]


def json_rows(path: Path, key: str | None = None) -> list[Row]:
    """Read the records of a JSON file.

    Args:
        path: the file.
        key: where in its object the list of records is; None if the file is the list.

    Raises:
        ValueError: naming file and line or record of what cannot be read.
    """
    value = read_json(path)
    if key is None:
        return rows_of(value, str(path))
    return rows_of(_row(str(path), value).get(key), str(path))


def named_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Read the records of a JSON file that is one object of name -> record.

    Raises:
        ValueError: naming file and line or record of what cannot be read.
    """
    for name, value in _row(str(path), read_json(path)).values.items():
        yield name, _row(f"{path}, record {name!r}", value)


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Read the records of a JSONL file, one by one; empty lines are skipped.

    Raises:
        ValueError: naming file and line of what cannot be read.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            raise ValueError(f"{path}:{number}: no JSON") from None
        yield _row(f"{path}:{number}", value)


def table_rows(path: Path, separator: str = ",") -> Iterator[Row]:
    """Read the records of a CSV or TSV file with a header, one by one.

    Args:
        path: the file.
        separator: what stands between cells.

    Raises:
        ValueError: naming file and line of a record with more or fewer cells than the header.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        header = _next_record(reader, path)
        if not header or len(set(header)) != len(header):
            raise ValueError(f"{path}:1: the header is empty or names a column twice")
        while (cells := _next_record(reader, path)) is not None:
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: {len(cells)} cells; the header has {len(header)}")
            # An empty cell is a missing value.
            yield Row(
                f"{path}:{reader.line_num}",
                {name: cell or None for name, cell in zip(header, cells, strict=True)},
            )


def parquet_rows(path: Path) -> Iterator[Row]:
    """Read the records of a parquet file, a few at a time.

    Raises:
        ImportError: if pyarrow is missing.
        ValueError: naming the file if it is no parquet file.
    """
    try:
        parquet = import_module("pyarrow.parquet")
        errors = import_module("pyarrow").ArrowException
    except ImportError:
        raise ImportError(f"{path}: parquet files need pyarrow; install it with: pip install 'mmfast[eval]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, record {number}", values)
    except errors as error:
        raise ValueError(f"{path}: no readable parquet file: {error}") from None


def rows(path: Path) -> Iterator[Row]:
    """Read the records of a file of any of these kinds, told by its suffix.

    Raises:
        ValueError: if the suffix is another, or naming the place of what cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        yield from json_rows(path)
    elif suffix == ".jsonl":
        yield from jsonl_rows(path)
    elif suffix in (".csv", ".tsv"):
        yield from table_rows(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        yield from parquet_rows(path)
    else:
        raise ValueError(f"{path}: suffix {path.suffix!r}; must be .json, .jsonl, .csv, .tsv or .parquet")


def _row(place: str, value: object) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: {type(value).__name__}; must be an object")
    return Row(place, value)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        try:
            while line := file.readline(MAX_LINE_CHARACTERS + 1):
                number += 1
                if len(line) > MAX_LINE_CHARACTERS:
                    raise ValueError(f"{path}:{number}: longer than {MAX_LINE_CHARACTERS} characters")
                yield number, line
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number + 1}: no UTF-8 text: {error.reason}") from None


def _next_record(reader: Any, path: Path) -> list[str] | None:
    # The limit is one number for the whole process: raised only while this record is read.
    before = csv.field_size_limit(MAX_LINE_CHARACTERS)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{reader.line_num + 1}: no UTF-8 text: {error.reason}") from None
    finally:
        csv.field_size_limit(before)
