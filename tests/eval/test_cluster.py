"""A sweep on a Ray cluster: lost workers and Ctrl-C cost no answer and add none, and the table is the same."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections import Counter, deque
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mmfast
from mmfast.cli import main
from mmfast.eval import Progress, evaluate
from mmfast.eval.cluster import _Piece, _Pool, evaluate_on_ray
from mmfast.eval.datasets import task
from mmfast.eval.results import merge
from support.untimed_table import untimed

ABSENT = "ray is not installed: pip install 'mmfast[ray]'"
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason=ABSENT)
IMAGES = task("shapes-image", num_questions=10)
PLAN = "divprune(keep=64)"


def written(folder: Path) -> Counter[tuple[str, str]]:
    """How often each plan and question is in the files."""
    found: Counter[tuple[str, str]] = Counter()
    for path in folder.glob("*.jsonl"):
        header, *lines = map(json.loads, path.read_text().splitlines())
        found.update((header["plan"], line["question_id"]) for line in lines)
    return found


@pytest.fixture
def global_state() -> Iterator[None]:
    """Variables, handlers and working folder are afterwards what they were before."""
    pytest.importorskip("ray", reason=ABSENT)
    before = (dict(os.environ), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), Path.cwd())
    yield
    after = (dict(os.environ), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), Path.cwd())
    # Of the running test, which pytest renames from phase to phase.
    for variables in (before[0], after[0]):
        variables.pop("PYTEST_CURRENT_TEST", None)
    assert after == before


@pytest.mark.slow
@needs_ray
def test_a_lost_worker_and_an_interruption_change_nothing(
    tiny: Any, tmp_path: Path, global_state: None, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    expected = evaluate(*tiny, [IMAGES], [PLAN], out=tmp_path / "alone", name="embedded")
    out, processes = tmp_path / "cluster", tmp_path / "processes"
    processes.mkdir()

    # A closure, so that it travels to workers that cannot import this file.
    def load() -> tuple[Any, Any]:
        torch.set_num_threads(1)
        (processes / str(os.getpid())).touch()
        return mmfast.load_default()

    def interrupt(state: Progress) -> None:
        if state.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_on_ray(load, [IMAGES], [PLAN], out=out, workers=2, name="embedded", progress=interrupt)
    assert not ray.is_initialized()
    assert sum(written(out).values()) == 5

    first = {int(path.name) for path in processes.iterdir()}
    killed: list[int] = []
    seen: list[Progress] = []

    def kill_one(state: Progress) -> None:
        seen.append(state)
        if state.done == 6:
            killed.append(min({int(path.name) for path in processes.iterdir()} - first))
            os.kill(killed[0], signal.SIGKILL)

    with caplog.at_level("WARNING", logger="mmfast.eval.cluster"):
        table = evaluate_on_ray(load, [IMAGES], [PLAN], out=out, workers=2, name="embedded", progress=kill_one)
    assert len(killed) == 1
    assert "was lost, another takes its place" in caplog.text
    assert untimed(table) == untimed(expected)
    # Full, the plan, and six baselines; each question once, over all files of all workers.
    assert sum(written(out).values()) == 8 * 10
    assert set(written(out).values()) == {1}
    assert (seen[-1].done, seen[-1].total) == (75, 75)
    alone, cluster = ({run.header.plan: run.records for run in merge([folder])} for folder in (tmp_path / "alone", out))
    for plan, records in alone.items():
        assert [(r.question_id, r.prediction, r.n_new) for r in cluster[plan]] == [
            (r.question_id, r.prediction, r.n_new) for r in records
        ]


@pytest.mark.slow
@needs_ray
def test_the_command_goes_on_with_what_is_there(
    tiny: Any, tmp_path: Path, global_state: None, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["eval", "--task", "shapes-image", "--set", "shapes-image.num_questions=6", "--no-baselines"]
    common += ["--device", "cpu", "--out", str(tmp_path), "--plan", PLAN]
    assert main([*common, "--limit", "2"]) == 0
    capsys.readouterr()
    assert sum(written(tmp_path).values()) == 4
    assert main([*common, "--ray", "local", "--ray-workers", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["plan"], row["n"]) for row in rows] == [("full", 6), (PLAN, 6)]
    assert set(written(tmp_path).values()) == {1}
    # A worker's errors are the user's: one line, not the traceback of another machine.
    assert main([*common, "--ray", "local", "--ray-workers", "1", "--max-new-tokens", "3"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "max_new_tokens: 10 there, 3 now" in error


class StandIn:
    """Stands in for the module ray: what is asked of a worker is answered from a script, "lost" by losing it."""

    class exceptions:
        class RayActorError(Exception):
            pass

        class RayTaskError(Exception):
            def __init__(self, cause: Exception) -> None:
                super().__init__("a long traceback")
                self.cause = cause

    def __init__(self, opened: list[Any], streams: list[list[Any]]) -> None:
        self.opened, self.streams = opened, streams
        self.made: list[Any] = []
        self.killed: list[Any] = []

    def make(self) -> Any:
        worker = SimpleNamespace(
            open=SimpleNamespace(remote=lambda: SimpleHandle(self.opened.pop(0))),
            answer=SimpleNamespace(
                options=lambda **_: SimpleNamespace(remote=lambda *_: iter([*self.streams.pop(0)])),
            ),
        )
        self.made.append(worker)
        return worker

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Any) -> Any:
        value = reference.value if isinstance(reference, SimpleHandle) else reference
        if value == "lost":
            raise self.exceptions.RayActorError("out of memory\nand more")
        if isinstance(value, Exception):
            raise self.exceptions.RayTaskError(value)
        return value

    def kill(self, worker: Any) -> None:
        self.killed.append(worker)


class SimpleHandle:
    """A reference to one value."""

    def __init__(self, value: Any) -> None:
        self.value = value


def pieces(count: int) -> deque[_Piece]:
    return deque(_Piece("answer", IMAGES, (index, count)) for index in range(count))


def test_a_lost_piece_is_given_out_again() -> None:
    cluster = StandIn(["opened"] * 3, [[1, 2, "lost"], [3], [4, 5]])
    with _Pool(cluster, cluster.make, 2) as pool:
        found = [(piece.shard[0], value) for _, piece, value in pool.run(pieces(2), lambda piece: ())]
    # What came before the loss counts, and the rest of that piece comes before all others.
    assert found == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5)]
    assert len(cluster.made) == 3
    assert len(cluster.killed) == 2


def test_what_loses_every_worker_is_given_up() -> None:
    cluster = StandIn(["opened"] * 9, [["lost"]] * 9)
    with (
        _Pool(cluster, cluster.make, 1) as pool,
        pytest.raises(RuntimeError, match=r"3 workers were lost over shard 0/1 of 'shapes-image'.*: out of memory$"),
    ):
        list(pool.run(pieces(1), lambda piece: ()))
    assert len(cluster.streams) == 9 - 3
    cluster = StandIn(["lost"] * 9, [])
    with (
        _Pool(cluster, cluster.make, 1) as pool,
        pytest.raises(RuntimeError, match=r"3 workers were lost while they loaded the model.*: out of memory$"),
    ):
        list(pool.run(pieces(1), lambda piece: ()))


@pytest.mark.parametrize(
    "script", [([FileNotFoundError("no weights")], []), (["opened"], [[FileNotFoundError("no weights")]])]
)
def test_errors_of_workers_arrive_as_their_own_kind(script: tuple[list[Any], list[Any]]) -> None:
    cluster = StandIn(*script)
    with _Pool(cluster, cluster.make, 1) as pool, pytest.raises(FileNotFoundError, match=r"^no weights$"):
        list(pool.run(pieces(1), lambda piece: ()))


def test_a_missing_ray_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'mmfast\[ray\]'"):
        evaluate_on_ray(mmfast.load_default, [IMAGES], [], out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_address_without_a_cluster_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    with socket.socket() as free:
        # Bound but not listening: nobody else can take the port meanwhile.
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address}"):
            evaluate_on_ray(mmfast.load_default, [IMAGES], [], out=tmp_path, address=address)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ray", "local", "--shard", "0/2"), "--shard=0/2 and --ray exclude each other"),
        (("--ray-workers", "2"), "--ray-workers=2 needs --ray"),
        (("--ray", "local", "--ray-workers", "0"), "--ray-workers=0 must be at least 1"),
    ],
)
def test_misuse_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    assert main(["eval", "--task", "shapes-image", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
