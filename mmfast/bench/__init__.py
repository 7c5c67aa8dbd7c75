"""Speed measured on this machine: operations against what it can do, models against themselves without a plan.

    from mmfast.bench import Options, run_bench
    results = run_bench(Options(scale="small"))

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfast.bench.contenders import Case, load_runner
    from mmfast.bench.goals import judged
    from mmfast.bench.suite import Options, run_bench

_HOME = {"Case": "contenders", "Options": "suite", "judged": "goals", "load_runner": "contenders", "run_bench": "suite"}

__all__ = ["Case", "Options", "judged", "load_runner", "run_bench"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mmfast.bench.{_HOME[name]}"), name)
