"""All cells in order, as many as there is time for."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mmfast.adapters import attention_backends, random_model, random_model_budgets
from mmfast.bench.ceilings import Ceilings, measured_ceilings
from mmfast.bench.contenders import Case, Contender, load_runner
from mmfast.bench.costs import Size
from mmfast.bench.goals import GOALS
from mmfast.bench.kernels import BATCHES, kernel_cell, kernel_sizes
from mmfast.bench.models import contenders_of, model_cell
from mmfast.bench.operations import OPERATIONS
from mmfast.bench.results import Results, default_path, machine_of
from mmfast.bench.timing import DeviceLostError, explained

SCALES = ("tiny", "small", "real")
LEVELS = ("kernels", "models")
_SECONDS = {"kernels": 3.0, "models": 20.0}
"""Most that the counted rounds of a cell take on a GPU."""
_PATIENCE = 10.0
"""How many times longer they may take on a CPU, where other work slows them down but does not count."""


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
        scale: ``"real"`` shapes, or ``"small"`` and ``"tiny"`` ones that a CPU runs in minutes and seconds.
        level: ``"kernels"`` or ``"models"``; None = both.
        match: only cells whose name contains this.
        plans: plans to measure instead of the usual ones.
        runners: runner files, see :func:`~mmfast.bench.contenders.load_runner`.
        repeats: counted rounds of each cell, fewer where they would take long.
        new_tokens: tokens of each answer.
        seconds: no cell is begun later than this; None = all are.
        device: where.
        dtype: of all numbers.
    """

    scale: Literal["tiny", "small", "real"] = "real"
    level: Literal["kernels", "models"] | None = None
    match: str = ""
    plans: tuple[str, ...] = ()
    runners: tuple[Path, ...] = ()
    repeats: int = 9
    new_tokens: int = 64
    seconds: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name, legal in (("scale", SCALES), ("level", (*LEVELS, None))):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, legal))}")
        for name, least in (("repeats", 1), ("new_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"seconds={self.seconds} must be positive, or None for as long as it takes")


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        key: its name in the results.
        run: measures it.
    """

    key: str
    run: Callable[[Ceilings], dict[str, Any]]


def run_bench(
    options: Options,
    out: Path | None = None,
    *,
    before_cell: Callable[[str, int, int], None] | None = None,
) -> Results:
    """Measure what is not in the results yet, and write each cell when it is finished.

    What the goals are about comes first. A call that is stopped, or runs out of time, is taken up by the next.

    Args:
        options: what, and how.
        out: the results file; None = one of this machine and day, in the folder where we are.
        before_cell: called with the name of each cell, how many are done, and how many there are.

    Returns:
        The results.

    Raises:
        ValueError: if a plan, a runner or the file cannot be used.
        DeviceLostError: if the device answers no more; another process can go on.
    """
    device = options.device
    results = Results(out or default_path(Path(), device), machine_of(device))
    runners = [load_runner(path) for path in options.runners]
    cells = [cell for cell in _cells(options, runners) if options.match in cell.key]
    waiting = [cell for cell in cells if not results.finished(cell.key)]
    begin = time.monotonic()
    with _one_thread(device):
        ceilings = measured_ceilings(device, options.dtype)
        results.begin(ceilings=ceilings.to_dict(), dtype=str(options.dtype).removeprefix("torch."))
        for place, cell in enumerate(waiting, len(cells) - len(waiting)):
            if options.seconds is not None and time.monotonic() - begin > options.seconds:
                break
            if before_cell is not None:
                before_cell(cell.key, place, len(cells))
            _measure(cell, ceilings, results)
    return results


def _measure(cell: Cell, ceilings: Ceilings, results: Results) -> None:
    try:
        found = _outcome(cell, ceilings)
    except DeviceLostError as lost:
        # Not to be tried again: it would take the device away from all others each time.
        results.add(cell.key, {"lost": str(lost)})
        raise
    results.add(cell.key, found)


def _outcome(cell: Cell, ceilings: Ceilings) -> dict[str, Any]:
    try:
        return cell.run(ceilings)
    except DeviceLostError:
        raise
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": explained(error)}
    except Exception as error:
        return {"failed": explained(error)}


def _cells(options: Options, runners: Sequence[Contender]) -> list[Cell]:
    """List all cells: those of the goals first, then models, then the rest of the operations."""
    kernels = list(_kernel_cells(options)) if options.level != "models" else []
    models = list(_model_cells(options, runners)) if options.level != "kernels" else []
    goals = {goal.cell for goal in GOALS}
    first = [cell for cell in (*kernels, *models) if cell.key in goals]
    return [*first, *(cell for cell in (*models, *kernels) if cell.key not in goals)]


def _kernel_cells(options: Options) -> Iterator[Cell]:
    for name in OPERATIONS:
        for size in kernel_sizes(options.scale, name, options.dtype):
            yield Cell(f"{options.scale}/kernel/{name}/{size.label}/b{size.batch}", _kernel_run(name, size, options))


def _kernel_run(name: str, size: Size, options: Options) -> Callable[[Ceilings], dict[str, Any]]:
    def run(ceilings: Ceilings) -> dict[str, Any]:
        return kernel_cell(
            name,
            size,
            device=options.device,
            dtype=options.dtype,
            ceilings=ceilings,
            repeats=options.repeats,
            seconds=_seconds("kernels", options.device),
        )

    return run


def _model_cells(options: Options, runners: Sequence[Contender]) -> Iterator[Cell]:
    held = _Held(options)
    flash = options.device.type == "cuda" and attention_backends().get("flash_attention_2") == "works"
    for name, kept in random_model_budgets(options.scale).items():
        contenders = contenders_of(
            kept,
            options.plans,
            flash=flash,
            compiled=options.device.type == "cuda" and not options.plans,
            more=runners,
        )
        for batch in BATCHES[options.scale]:
            for contender in contenders:
                key = f"{options.scale}/model/{name}/b{batch}/{contender.name}"
                yield Cell(key, _model_run(contender, name, batch, held, options))


def _model_run(
    contender: Contender, name: str, batch: int, held: _Held, options: Options
) -> Callable[[Ceilings], dict[str, Any]]:
    def run(ceilings: Ceilings) -> dict[str, Any]:
        return model_cell(
            contender,
            held.case(name, batch),
            ceilings=ceilings,
            new_tokens=options.new_tokens,
            repeats=options.repeats,
            seconds=_seconds("models", options.device),
        )

    return run


def _seconds(level: str, device: torch.device) -> float:
    return _SECONDS[level] * (_PATIENCE if device.type == "cpu" else 1.0)


class _Held:
    """The model that was built last: cells of one model follow each other, and two need not fit."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._name = ""
        self._model: Any = None

    def case(self, name: str, batch: int) -> Case:
        options = self._options
        if name != self._name:
            self._model, self._name = None, ""
            gc.collect()
            self._model = random_model(name, options.scale, device=options.device, dtype=options.dtype)
            self._name = name
        inputs = self._model.inputs(batch)
        return Case(name, options.scale, self._model.model, inputs, batch, options.device, options.dtype)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Count processor seconds of one thread: more threads cost more of them."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
