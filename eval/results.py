"""Results on disk: one JSON line per question, written at once, so that nothing is lost when a run is killed.

A file holds one header line, for one task under one plan on one model, and then one line per sample. Several
processes each write a file of their own; :func:`merge` brings them together and takes every sample once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

from mmfast.eval.records import FORMAT, Header, Record, Run

T = TypeVar("T", "Header", "Record")


class ResultsFile:
    """A file that records are appended to, new or broken off, by one writer at a time.

    A second writer is refused while the first has the file open, and let in when it closes it or dies, however it does.
    Systems without ``flock`` (Windows) and file systems without locks do not tell writers apart: there, as everywhere,
    processes that run at once need different shards or folders.

    Args:
        path: the file; its folder is made.
        header: what will be run.
        retry_failed: take failed samples for unfinished.

    Raises:
        BlockingIOError: if another writer has the file open.
        ValueError: if the file holds results of something else, or a line of it cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> header = Header("t", 1, {}, "accuracy", 0.0, "full", "m", "w", "float32", 8, 1, 4)
        >>> with TemporaryDirectory() as folder:
        ...     with ResultsFile(Path(folder) / "a.jsonl", header) as file:
        ...         file.append(Record("q1", "t", "yes", "yes", ("yes",), 1.0))
        ...     ResultsFile(Path(folder) / "a.jsonl", header).finished
        {'q1'}
    """

    def __init__(self, path: Path, header: Header, *, retry_failed: bool = False) -> None:
        self.path = path
        self.finished: set[str] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("ab")
        try:
            self._begin(header, retry_failed)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, header: Header, retry_failed: bool) -> None:
        """Find out what the file holds, and make it ready for more."""
        path = self.path
        # Before it is read: what the other writer has not finished yet would be taken for torn, and cut off.
        _lock(self._file, path)
        held, whole = _lines(path)
        if held:
            there, records = _parsed(path, held)
            differing = there.misfits(header)
            if differing:
                raise ValueError(
                    f"{path} holds results that do not fit this run: {'; '.join(differing)}. "
                    "Choose another folder for these, or move the file away to start anew"
                )
            self.finished = {record.question_id for record in records if not (retry_failed and record.error)}
        # What a killed process left of a line: a new line must not be glued to it.
        self._file.truncate(whole)
        if not held:
            self._write(header)

    def append(self, record: Record) -> None:
        """Write one record; it is with the operating system when this returns."""
        self._write(record)
        self.finished.add(record.question_id)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: Header | Record) -> None:
        text = json.dumps(vars(line), ensure_ascii=False, default=str)
        self._file.write(text.encode("utf-8", errors="backslashreplace") + b"\n")
        self._file.flush()

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Missing if the file could not be opened.
        if hasattr(self, "_file"):
            self._file.close()


def _lock(file: BinaryIO, path: Path) -> None:
    """Refuse a file that another writer has open; the lock goes with the file, and with its process."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            f"{path} is being written by another run; wait for it, or choose another folder. "
            "Processes that share a folder need shards of their own: --shard 0/2 and --shard 1/2, or shard=(0, 2)"
        ) from None
    except OSError:
        # Some file systems, many of them on a network, know no locks.
        return


def file_name(task: str, plan: str, model: str, shard: tuple[int, int] = (0, 1)) -> str:
    """Return the name of the file of one task, plan, model and shard.

    Example:
        >>> file_name("shapes-image", "divprune(keep=64)", "tiny", (0, 2))
        'shapes-image--tiny--divprune-keep=64--fcd95abe--0of2.jsonl'
    """
    # Plans that differ in a sign that no file name can hold must not share a file.
    digest = hashlib.sha256("\n".join((task, plan, model)).encode()).hexdigest()[:8]
    names = [re.sub(r"[^A-Za-z0-9._=]+", "-", part)[:60].strip("-") for part in (task, model, plan)]
    index, count = shard
    part = f"--{index}of{count}" if count > 1 else ""
    return f"{'--'.join(names)}--{digest}{part}.jsonl"


def read_results(path: Path) -> tuple[Header, list[Record]]:
    """Read one file; a last line that a killed process did not finish is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of what cannot be read, or a file without a header.
    """
    held, _ = _lines(path)
    if not held:
        raise ValueError(f"{path} holds no header line: no results were written to it yet")
    return _parsed(path, held)


def merge(paths: Iterable[Path]) -> list[Run]:
    """Bring files together: every (task, plan, model) once, and in it every sample once.

    Where a sample was answered more than once, a success counts before a failure, then the first file in
    alphabetical order.

    Args:
        paths: files, and folders whose ``.jsonl`` files are taken; files without a header are passed over.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if files of one task, plan and model do not fit together, or cannot be read.
    """
    headers: dict[tuple[str, str, str], tuple[Path, Header]] = {}
    records: dict[tuple[str, str, str], dict[str, Record]] = {}
    machines: dict[tuple[str, str, str], list[Mapping[str, str | int]]] = {}
    for path in _files(paths):
        held, _ = _lines(path)
        if not held:
            continue
        header, found = _parsed(path, held)
        key = header.key
        first, expected = headers.setdefault(key, (path, header))
        differing = expected.misfits(header)
        if differing:
            raise ValueError(
                f"{first} and {path} do not fit together ('there' is the first): {'; '.join(differing)}. "
                "Keep results of different settings in different folders"
            )
        kept = records.setdefault(key, {})
        for record in found:
            before = kept.get(record.question_id)
            if before is None or (before.error and not record.error):
                kept[record.question_id] = record
        if header.hardware not in machines.setdefault(key, []):
            machines[key].append(header.hardware)
    return [
        Run(headers[key][1], tuple(records[key][name] for name in sorted(records[key])), tuple(machines[key]))
        for key in sorted(records)
    ]


def _files(paths: Iterable[Path]) -> list[Path]:
    found: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; name a results file or the folder of a run")
        found.update(path.glob("*.jsonl") if path.is_dir() else [path])
    return sorted(found)


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the complete lines of a file, and how many bytes they take."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines(keepends=True)
    held: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            if number == len(lines):
                # A full disk or a power cut can leave a last line of anything.
                return held, whole - len(line)
            raise ValueError(f"{path}, line {number}: {error}; remove this line to go on without it") from None
        held.append(value)
    return held, whole


def _parsed(path: Path, lines: list[dict[str, Any]]) -> tuple[Header, list[Record]]:
    if lines[0].get("format") != FORMAT:
        raise ValueError(
            f"{path}, line 1: this release reads result files of format {FORMAT}, got {lines[0].get('format')!r}; "
            "choose another folder or another file"
        )
    records = [_built(Record, line, path, number) for number, line in enumerate(lines[1:], start=2)]
    return _built(Header, lines[0], path, 1), records


def _built(kind: type[T], line: dict[str, Any], path: Path, number: int) -> T:
    known = {item.name for item in fields(kind)}
    try:
        values: dict[str, Any] = {
            name: tuple(value) if name in ("answers", "choices") else value for name, value in line.items()
        }
        return kind(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise ValueError(f"{path}, line {number}: {error}; this is no line of a results file") from None
