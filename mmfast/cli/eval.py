"""Measure accuracy and cost of plans on data sets, beside baselines of equal token count."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfast.cli import common
from mmfast.cli.task_options import read_options
from mmfast.zoo import EMBEDDED

if TYPE_CHECKING:
    from mmfast import Plan
    from mmfast.eval import Progress, Table, Task

OUT = Path("mmfast-eval")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--task", metavar="NAME[,NAME]", help="data sets; --list shows them")
    parser.add_argument(
        "--plan", action="append", default=[], help="a plan; repeat the option for more. The full model is always run"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TASK.FIELD=VALUE",
        help="an option of a task, for example pope.split=random; repeat it for more",
    )
    common.add_model_arguments(parser)
    parser.add_argument(
        "--data", type=Path, metavar="ROOT", help="folder of the data sets, or one with a folder NAME each"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder of the results, resumed if there (default {OUT})"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="ask at most N questions of each task")
    parser.add_argument("--seed", type=int, metavar="S", help="draw the N questions by lot; default: the first ones")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        default="0/1",
        help="ask part I of N, from 0; auto takes both from torchrun or accelerate",
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="run on the Ray cluster at this address; local starts one on this machine"
    )
    parser.add_argument(
        "--ray-workers",
        type=int,
        metavar="N",
        help="models loaded in the cluster; default: one for each GPU or, without any, for each machine",
    )
    parser.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run random (3 seeds), uniform, pool2d and downsample with as many tokens as each plan leaves (default)",
    )
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="questions at once; only 1 (default) is timed"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="tokens of an answer; default: as the task says"
    )
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="frames taken from a video file (default 8)")
    parser.add_argument("--retry-failed", action="store_true", help="ask questions again that failed before")
    parser.add_argument(
        "--list", action="store_true", help="list the tasks and whether their data are there; run nothing"
    )
    parser.add_argument("--show", action="store_true", help="show what lies in --out; run nothing")
    parser.add_argument(
        "--report", type=Path, metavar="PAGE.html", help="write a page with charts and the questions lost and won"
    )


def run(options: argparse.Namespace) -> None:
    """List, show or evaluate."""
    if options.list:
        _list(options)
        return
    out = options.out or OUT
    common.check_page("report", options.report)
    if options.show:
        from mmfast.eval import summarize

        _finish(summarize([out]), out, options)
        return
    if options.task is None:
        raise ValueError("--task is missing: name one or more, separated by commas; --list shows them")
    common.check_numbers(options, "batch", "frames")
    for name in ("limit", "max_new_tokens", "ray_workers"):
        if getattr(options, name) is not None:
            common.check_numbers(options, name)
    if options.seed is not None and options.limit is None:
        raise ValueError(f"--seed={options.seed} draws questions and needs --limit; without it all questions are asked")
    shard = shard_of_process() if options.shard == "auto" else parse_shard(options.shard)
    if options.ray is None and options.ray_workers is not None:
        raise ValueError(f"--ray-workers={options.ray_workers} needs --ray, the address of the cluster or local")
    if options.ray is not None and options.shard != "0/1":
        raise ValueError(f"--shard={options.shard} and --ray exclude each other: Ray shares the questions out itself")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file; name a folder")

    import mmfast

    plans = [mmfast.Plan.of(plan) for plan in options.plan]
    names = [name.strip() for name in options.task.split(",")]
    given = read_options(options.set, names)
    data = options.data.resolve() if options.data and options.ray is not None else options.data
    tasks = [_task(name, data, given.get(name, {})) for name in names]
    if options.ray is None:
        # Refused before anything is said; the workers of a cluster have devices of their own.
        common.device_of(_device_name(options))
    common.quiet_libraries()
    if options.model is None:
        sys.stderr.write(f"note: this is {common.DEMO}; --model takes any other\n")
    settings = {
        "out": out,
        "with_baselines": options.baselines,
        "limit": options.limit,
        "seed": options.seed,
        "batch": options.batch,
        "max_new_tokens": options.max_new_tokens,
        "frames": options.frames,
        "name": _model_name(options.model),
        "retry_failed": options.retry_failed,
    }
    if options.ray is None:
        table = _evaluate(options, tasks, plans, shard, settings)
    else:
        table = _evaluate_on_ray(options, tasks, plans, settings)
    sys.stderr.write(f"results are in {out}\n")
    _finish(table, out, options, tasks)


def _evaluate(
    options: argparse.Namespace,
    tasks: Sequence[Task],
    plans: Sequence[Plan],
    shard: tuple[int, int],
    settings: dict[str, Any],
) -> Table:
    from mmfast.eval import evaluate

    device = common.device_of(_device_name(options))
    with common.working("loading the model"):
        model, processor = common.load_model(options, device)
    with _bar() as progress:
        return evaluate(model, processor, tasks, plans, shard=shard, progress=progress, **settings)


def _evaluate_on_ray(
    options: argparse.Namespace, tasks: Sequence[Task], plans: Sequence[Plan], settings: dict[str, Any]
) -> Table:
    from mmfast.eval.cluster import evaluate_on_ray

    # What a worker needs to know, and nothing that only this process could read.
    model = argparse.Namespace(model=_absolute(options.model), dtype=options.dtype, device=options.device)
    gpus = 0 if (options.device or "").startswith("cpu") else None
    with _bar() as progress:
        return evaluate_on_ray(
            partial(_load_in_worker, model),
            tasks,
            plans,
            address=options.ray,
            workers=options.ray_workers,
            gpus=gpus,
            progress=progress,
            **settings,
        )


def _load_in_worker(options: argparse.Namespace) -> tuple[Any, Any]:
    common.quiet_libraries()
    # Found out here: the process that started all this may have no GPU.
    return common.load_model(options, common.device_of(options.device))


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``I/N``, a shard numbered from 0.

    Raises:
        ValueError: if it is not of this form, or there is no such shard.

    Example:
        >>> parse_shard("1/4")
        (1, 4)
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise ValueError(f"--shard={text} must be I/N with I from 0 to N-1, for example 0/2 and 1/2, or auto")
    return int(found[1]), int(found[2])


def shard_of_process() -> tuple[int, int]:
    """Return the part of this process among those that torchrun or ``accelerate launch`` started.

    Raises:
        ValueError: if it was started by neither.
    """
    # A launcher tells its processes who they are in no other way.
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or size is None:
        raise ValueError(
            "--shard=auto needs torchrun or accelerate launch, which set RANK and WORLD_SIZE; or write I/N"
        )
    return parse_shard(f"{rank}/{size}")


def _device_name(options: argparse.Namespace) -> str | None:
    """Name the device of this process; a launcher leaves it to its processes to take one GPU each."""
    if options.device is not None or options.shard != "auto":
        found: str | None = options.device
        return found
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else None


def _absolute(model: str | None) -> str | None:
    """Write a folder so that processes which run elsewhere find it."""
    return str(Path(model).resolve()) if model is not None and Path(model).exists() else model


def _task(name: str, data: Path | None, given: Mapping[str, Any]) -> Task:
    from mmfast.eval.datasets import task, task_class

    takes_files = any(field.name == "root" for field in fields(task_class(name)))
    if data is None or not takes_files:
        return task(name, **given)
    root = data / name if (data / name).is_dir() else data
    return task(name, **{"root": root, **given})


def _model_name(model: str | None) -> str:
    """Name the model in the results: of a folder only the last part, for it lies elsewhere on other machines."""
    if model is None:
        return EMBEDDED
    return Path(model).resolve().name if Path(model).exists() else model


def _list(options: argparse.Namespace) -> None:
    """Show every task; whether its data are there is found out by reading the first question."""
    from mmfast.eval.datasets import task_class, task_names

    given = read_options(options.set, task_names())
    rows = []
    for name in task_names():
        kind, state = task_class(name), "ready"
        try:
            next(iter(_task(name, options.data, given.get(name, {})).samples()))
        except (OSError, ValueError, ImportError) as error:
            state = common.one_line(str(error))
        summary = (kind.__doc__ or "").strip().split("\n")[0]
        rows.append({"task": name, "media": kind.media, "metric": kind.metric, "data": state, "summary": summary})
    if options.json:
        common.write_json({"tasks": rows})
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in rows[0]:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    common.console().print(table)


def _finish(table: Table, out: Path, options: argparse.Namespace, tasks: Sequence[Task] = ()) -> None:
    """Write the page, if one is wanted, and print the table."""
    if options.report is not None:
        from mmfast.eval.report import write_report

        write_report(options.report, [out], found=table, tasks=tasks)
        sys.stderr.write(f"wrote {options.report}\n")
    if options.json:
        common.write_json(table.to_dict())
    else:
        sys.stdout.write(f"{table}\n")


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """Show on stderr how far the evaluation is."""
    with common.bar("preparing") as move:
        yield lambda state: move(total=state.total, completed=state.done, description=f"{state.task}, {state.plan}")
