"""Data sets, metrics and runners, imported as ``mmfast.eval``: the only room that knows data.

>>> from mmfast.eval.datasets import task
>>> next(task("shapes-image").samples()).question
'can you see an orange ring?'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmfast.eval.datasets import Shapes
from mmfast.eval.task import Outcome, Sample, Scored, Task

if TYPE_CHECKING:
    from mmfast.eval.cluster import evaluate_on_ray
    from mmfast.eval.results import merge
    from mmfast.eval.runner import evaluate_shard
    from mmfast.eval.summary import Table, summarize
    from mmfast.eval.sweep import Progress, evaluate

# What imports torch waits until it is used: metrics and data sets do without.
_HOME = {
    "Progress": "sweep",
    "Table": "summary",
    "evaluate": "sweep",
    "evaluate_on_ray": "cluster",
    "evaluate_shard": "runner",
    "merge": "results",
    "summarize": "summary",
}

__all__ = [
    "Outcome",
    "Progress",
    "Sample",
    "Scored",
    "Shapes",
    "Table",
    "Task",
    "evaluate",
    "evaluate_on_ray",
    "evaluate_shard",
    "merge",
    "summarize",
]


def __getattr__(name: str) -> Any:
    """Import a runner's name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'mmfast.eval' has no attribute {name!r}")
    value = getattr(import_module(f"mmfast.eval.{_HOME[name]}"), name)
    globals()[name] = value
    return value
