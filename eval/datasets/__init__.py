"""Data sets: what a model is asked, and what would be right.

Every data set is a :class:`~mmfast.eval.task.Task` with a name. :func:`task` builds one by its name;
nothing is ever downloaded, and no data set is imported before it is asked for.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from mmfast.eval.datasets.shapes import Record, Shapes, render_clip, score
from mmfast.eval.task import Task

__all__ = ["TASKS", "Record", "Shapes", "render_clip", "score", "task", "task_class", "task_names"]

TASKS: dict[str, str] = {
    "activitynet-qa": "mmfast.eval.datasets.activitynet_qa:ActivityNetQa",
    "chartqa": "mmfast.eval.datasets.chartqa:ChartQa",
    "coco-caption": "mmfast.eval.datasets.coco_caption:CocoCaption",
    "docvqa": "mmfast.eval.datasets.docvqa:DocVqa",
    "egoschema": "mmfast.eval.datasets.egoschema:EgoSchema",
    "gqa": "mmfast.eval.datasets.gqa:Gqa",
    "longvideobench": "mmfast.eval.datasets.longvideobench:LongVideoBench",
    "mlvu": "mmfast.eval.datasets.mlvu:Mlvu",
    "mmbench": "mmfast.eval.datasets.mmbench:MmBench",
    "mme": "mmfast.eval.datasets.mme:Mme",
    "mmmu": "mmfast.eval.datasets.mmmu:Mmmu",
    "msrvtt-qa": "mmfast.eval.datasets.msrvtt_qa:MsrvttQa",
    "msvd-qa": "mmfast.eval.datasets.msvd_qa:MsvdQa",
    "mvbench": "mmfast.eval.datasets.mvbench:MvBench",
    "next-qa": "mmfast.eval.datasets.next_qa:NextQa",
    "own": "mmfast.eval.datasets.own:Own",
    "pope": "mmfast.eval.datasets.pope:Pope",
    "refcoco": "mmfast.eval.datasets.refcoco:RefCoco",
    "scienceqa": "mmfast.eval.datasets.scienceqa:ScienceQa",
    "seed": "mmfast.eval.datasets.seed:Seed",
    "shapes-image": "mmfast.eval.datasets.shapes.task:ShapesImage",
    "shapes-video": "mmfast.eval.datasets.shapes.task:ShapesVideo",
    "textvqa": "mmfast.eval.datasets.textvqa:TextVqa",
    "video-mme": "mmfast.eval.datasets.video_mme:VideoMme",
    "vqav2": "mmfast.eval.datasets.vqav2:VqaV2",
}
"""Name of a task -> ``"module:Class"``, imported when the task is asked for."""


def task_names() -> list[str]:
    """Return the names of all tasks, in alphabetical order.

    Example:
        >>> "shapes-image" in task_names()
        True
    """
    return sorted(TASKS)


def task_class(name: str) -> type[Task]:
    """Return the class of a task, imported if it was not yet.

    Raises:
        ValueError: if there is no such task; near matches are named.
        ImportError: if the task needs a package that is missing.

    Example:
        >>> task_class("shapes-video").media
        'video'
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(task_names())}"
        raise ValueError(f"there is no task {name!r}; {hint}")
    module, _, attribute = TASKS[name].partition(":")
    found: type[Task] = getattr(import_module(module), attribute)
    return found


def task(name: str, root: str | Path | None = None, **options: Any) -> Task:
    """Build a task by its name; its data are read only when its samples are.

    Args:
        name: one of :func:`task_names`.
        root: the folder with the files of the data set; rendered data sets have none and take none.
        options: fields of the task's class, such as ``split``.

    Raises:
        ValueError: for an unknown task or option, near matches named, or an option out of its range.

    Example:
        >>> task("shapes-image", num_questions=6).name
        'shapes-image'
    """
    kind = task_class(name)
    known = [field.name for field in fields(kind) if field.init]
    if root is not None:
        options["root"] = Path(root)
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise ValueError(f"task {name!r} has no option {option!r}; {hint}")
    return kind(**options)
