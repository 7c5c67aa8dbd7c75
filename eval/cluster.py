"""The same sweep on a Ray cluster: every worker holds the model, every answer travels back to one folder.

Only the disk of the calling process, the driver, counts: it writes all results, a file for each worker, task and plan.
Workers need mmfast, the model and the data; no folder has to be shared for the results.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

import mmfast
from mmfast.eval.records import Header, Record
from mmfast.eval.results import ResultsFile, file_name, merge
from mmfast.eval.summary import Table, summarize
from mmfast.eval.sweep import Clock, Progress, asked_plans, watching
from mmfast.eval.task import Task
from mmfast.eval.worker import Described, Worker

# Each piece reads the data set anew, so not many; several for each worker, so that a slow one gets fewer of them.
_PIECES = 4
# A piece that ends a worker each time, for want of memory for example, would do so for ever.
_ATTEMPTS = 3
_KNOCK_SECONDS = 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Piece:
    """What one worker is given at once: ``method`` of :class:`Worker` for a task and, for answers, a shard of it."""

    method: str
    task: Task
    shard: tuple[int, int] = (0, 1)
    attempts: int = 0


def evaluate_on_ray(
    load: Callable[[], tuple[nn.Module, Any]],
    tasks: Sequence[Task],
    plans: Sequence[mmfast.Plan | str],
    *,
    out: str | Path,
    address: str = "local",
    workers: int | None = None,
    gpus: float | None = None,
    with_baselines: bool = True,
    limit: int | None = None,
    seed: int | None = None,
    batch: int = 1,
    max_new_tokens: int | None = None,
    frames: int = 8,
    name: str | None = None,
    retry_failed: bool = False,
    progress: bool | Callable[[Progress], None] = False,
) -> Table:
    """Do what :func:`~mmfast.eval.sweep.evaluate` does, on the machines of a Ray cluster.

    Every answer is on the disk of this process when it arrives. A worker that is lost is replaced, and what it had not
    answered is asked again. A sweep that was broken off goes on where it stopped when it is called again with the same
    folder, on as many workers as there are then; answers that other processes left in the folder count too.

    Args:
        load: called once in each worker, returns a model and its processor. It travels by name, so it must be
            importable there, or be a closure; ``functools.partial`` passes arguments.
        tasks: the data sets; their folders are those of the workers.
        plans: plans, as text or objects; the full model is always run.
        out: folder of the results, on this machine.
        address: ``"local"`` starts Ray on this machine; else the address of a cluster, or ``"auto"``. Where Ray
            already runs in this process, it is used and left running.
        workers: how many models are loaded; None takes one for each GPU of the cluster, or, without any, for each
            machine.
        gpus: GPUs of each worker; None takes 1 where the cluster has any.
        with_baselines: run beside each plan the baselines of its token count.
        limit: questions of each task; None for all.
        seed: draw them by lot; None takes the first ones.
        batch: questions answered at once; only batches of one are timed.
        max_new_tokens: tokens an answer may have; None leaves it to the task.
        frames: frames taken from a video file.
        name: what the results call the model; None takes what :class:`Runner` calls it.
        retry_failed: ask questions again that failed in an earlier run.
        progress: called after every answer; True shows a bar.

    Returns:
        The table of everything that lies in ``out``.

    Raises:
        ImportError: if Ray is not installed.
        ValueError: if a plan does not suit the model, a number is out of range, two tasks have one name, or the
            folder holds results that do not fit.
        BlockingIOError: if another process is writing the same part of the results to the folder.
        FileNotFoundError: if the files of a task are missing where a worker looks for them.
        ConnectionError: if there is no cluster at the address.
        RuntimeError: if workers were lost again and again over the same questions.

    Example:
        >>> evaluate_on_ray(mmfast.load_default, [], [], out="results", workers=0)
        Traceback (most recent call last):
        ValueError: workers=0 must be at least 1, or None for one on each GPU
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1, or None for one on each GPU")
    asked = asked_plans(tasks, plans)
    settings = {"name": name, "batch": batch, "max_new_tokens": max_new_tokens, "frames": frames}
    folder = Path(out)
    notes: list[str] = []
    with ExitStack() as stack:
        ray = stack.enter_context(_session(address, workers))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        there = sum(node.get("GPU", 0) for node in nodes)
        gpus = float(there > 0) if gpus is None else gpus
        size = workers or max(1, int(there / gpus) if gpus else len(nodes))
        # Ray gives a process as many threads as CPUs; beside a GPU one will do.
        cpus = 1 if gpus else cpus_of_worker([int(node.get("CPU", 0)) for node in nodes], size)
        kind = ray.remote(Worker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0)
        pool = stack.enter_context(_Pool(ray, lambda: kind.remote(load, settings, limit, seed), size))
        results = stack.enter_context(_Results(folder, retry_failed))
        described: dict[str, Described] = {}
        ask = deque(_Piece("describe", task) for task in tasks)
        for _, piece, found in pool.run(ask, lambda piece: (piece.task, asked, with_baselines)):
            for header in found.headers.values():
                results.check(header)
            described[piece.task.name] = found
        pieces: deque[_Piece] = deque()
        total = 0
        for task in tasks:
            found = described[task.name]
            notes += found.notes
            open_ = sum(max(0, found.questions - len(done)) for done in results.finished(found.headers).values())
            total += open_
            count = min(found.questions, _PIECES * size) if open_ else 0
            pieces += [_Piece("answer", task, (index, count)) for index in range(count)]
        watch = stack.enter_context(watching(progress))
        clock = Clock(total, watch)

        def arguments(piece: _Piece) -> tuple[Any, ...]:
            # Read when the piece is given out: what a lost worker has answered is not asked again.
            return piece.task, results.finished(described[piece.task.name].headers), piece.shard

        for number, piece, (plan, line) in pool.run(pieces, arguments):
            if results.receive(number, plan, line):
                clock.tick(piece.task.name, plan)
    table = summarize([folder], tasks=tasks)
    return replace(table, notes=(*table.notes, *dict.fromkeys(notes)))


def cpus_of_worker(machines: Sequence[int], workers: int) -> int:
    """Return the most CPUs that each worker can have if all of them are to find a place.

    Args:
        machines: CPUs of each machine.
        workers: how many workers there will be.

    Example:
        >>> cpus_of_worker([3, 3], 2), cpus_of_worker([3, 3], 3), cpus_of_worker([1], 4)
        (3, 1, 1)
    """
    fitting = (each for each in range(max(machines), 1, -1) if sum(own // each for own in machines) >= workers)
    return next(fitting, 1)


class _Pool:
    """Workers that take one piece after the other, each replaced by another when it is lost."""

    def __init__(self, ray: Any, make: Callable[[], Any], size: int) -> None:
        self._ray, self._make = ray, make
        self._workers = [make() for _ in range(size)]
        # A worker gets its first piece once its model is loaded: one the cluster has no place for must not hold any.
        self._opening = {worker.open.remote(): number for number, worker in enumerate(self._workers)}
        self._idle: list[int] = []
        self._lost_opening = 0

    def run(
        self, pieces: deque[_Piece], arguments: Callable[[_Piece], tuple[Any, ...]]
    ) -> Iterator[tuple[int, _Piece, Any]]:
        """Yield what the workers yield for the pieces, as it arrives, with the number of the worker.

        Raises:
            RuntimeError: if workers are lost again and again over one piece.
        """
        streams: dict[Any, tuple[int, _Piece]] = {}
        while pieces or streams:
            while pieces and self._idle:
                number, piece = self._idle.pop(0), pieces.popleft()
                method = getattr(self._workers[number], piece.method).options(num_returns="streaming")
                streams[method.remote(*arguments(piece))] = (number, piece)
            (ready,), _ = self._ray.wait([*streams, *self._opening], num_returns=1)
            if ready in self._opening:
                self._opened(ready)
                continue
            number, piece = streams[ready]
            try:
                value = self._value(next(ready))
            except StopIteration:
                del streams[ready]
                self._idle.append(number)
            except self._ray.exceptions.RayActorError as error:
                del streams[ready]
                if piece.attempts + 1 == _ATTEMPTS:
                    raise RuntimeError(
                        f"{_ATTEMPTS} workers were lost over shard {piece.shard[0]}/{piece.shard[1]} of "
                        f"{piece.task.name!r}; what was answered is kept. The last one: {_first_line(error)}"
                    ) from None
                pieces.appendleft(replace(piece, attempts=piece.attempts + 1))
                self._replace(number, error)
            else:
                yield number, piece, value

    def _opened(self, ready: Any) -> None:
        number = self._opening.pop(ready)
        try:
            self._value(ready)
        except self._ray.exceptions.RayActorError as error:
            self._lost_opening += 1
            if self._lost_opening == _ATTEMPTS:
                raise RuntimeError(
                    f"{_ATTEMPTS} workers were lost while they loaded the model. The last one: {_first_line(error)}"
                ) from None
            self._replace(number, error)
        else:
            self._idle.append(number)

    def _value(self, reference: Any) -> Any:
        """Return what a worker made, or raise the error it met as if it had been met here."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            # The worker's traceback is the cause's text already; callers know the error by its own kind.
            if isinstance(error.cause, Exception):
                raise error.cause from None
            raise

    def _replace(self, number: int, error: Exception) -> None:
        _log.warning("worker %d was lost, another takes its place: %s", number, _first_line(error))
        worker = self._workers[number] = self._make()
        self._opening[worker.open.remote()] = number

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        # Also where Ray goes on: nobody will ask these workers again.
        for worker in self._workers:
            self._ray.kill(worker)


class _Results:
    """The folder of the results: what is in it, and a file for each worker, task and plan."""

    def __init__(self, folder: Path, retry_failed: bool) -> None:
        self._folder = folder
        self._headers: dict[tuple[str, str, str], Header] = {}
        self._finished: dict[tuple[str, str, str], set[str]] = {}
        self._files: dict[Path, ResultsFile] = {}
        self._current: dict[tuple[int, str, str], tuple[ResultsFile, set[str]]] = {}
        for run in merge([folder]) if folder.exists() else []:
            answered = (record for record in run.records if not (retry_failed and record.error))
            self._headers[run.header.key] = run.header
            self._finished[run.header.key] = {record.question_id for record in answered}

    def check(self, header: Header) -> None:
        """Refuse to mix what does not fit together.

        Raises:
            ValueError: naming what differs from the results that are there.
        """
        differing = self._headers.setdefault(header.key, header).misfits(header)
        if differing:
            raise ValueError(
                f"{self._folder} holds results of {header.task!r} under {header.plan!r} that do not fit this run: "
                f"{'; '.join(differing)}. Choose another folder, and load the same model in every worker"
            )

    def finished(self, headers: Mapping[str, Header]) -> dict[str, set[str]]:
        """Return the samples that each plan has answered."""
        return {plan: self._finished.setdefault(header.key, set()) for plan, header in headers.items()}

    def receive(self, worker: int, plan: str, line: Header | Record) -> bool:
        """Write what a worker yielded; return whether it was an answer."""
        if isinstance(line, Record):
            file, finished = self._current[worker, line.task, plan]
            file.append(line)
            finished.add(line.question_id)
            return True
        self.check(line)
        # A replaced worker may run on another machine, of whose times its file must not speak.
        machine = hashlib.sha256(json.dumps(line.hardware, sort_keys=True).encode()).hexdigest()[:8]
        path = self._folder / file_name(line.task, plan, line.model)
        path = path.with_name(f"{path.stem}--worker{worker}-{machine}.jsonl")
        if path not in self._files:
            self._files[path] = ResultsFile(path, line)
        self._current[worker, line.task, plan] = self._files[path], self._finished.setdefault(line.key, set())
        return False

    def __enter__(self) -> _Results:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


@contextmanager
def _session(address: str, workers: int | None) -> Iterator[Any]:
    """Lend Ray, connected; afterwards the process is as it was before."""
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise ImportError(f"a cluster needs Ray ({error}): pip install 'mmfast[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    _knock(address)
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    # As many CPUs as workers: on fewer, the last ones would wait for ever.
    local = {"num_cpus": max(workers or 1, os.cpu_count() or 1), "include_dashboard": False}
    options = {"log_to_driver": False, "configure_logging": False, **(local if address == "local" else {})}
    connected: dict[str, str] = {}
    try:
        ray.init(address=address, **options)
        connected.update(os.environ)
        yield ray
    finally:
        ray.shutdown()
        # Ray leaves a handler and variables behind.
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        _undo(os.environ, environment, connected)


def _knock(address: str) -> None:
    """Refuse an address where nobody listens; Ray would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()) or "://" in address:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error}); give the address that ray start showed, or local"
        ) from None


def _undo(variables: MutableMapping[str, str], before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Give variables that were set between two moments the values of the first; others stay as they are now."""
    for name in after:
        if name not in before:
            variables.pop(name, None)
        elif before[name] != after[name]:
            variables[name] = before[name]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
