"""Options of tasks as they are written on the command line: ``TASK.FIELD=VALUE``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_BOOLEANS = {"true": True, "false": False}
_READERS: dict[Any, Callable[[str], Any]] = {
    bool: lambda text: _BOOLEANS[text.lower()],
    int: int,
    float: float,
    Path: Path,
    tuple[str, ...]: lambda text: tuple(part.strip() for part in text.split(",")),
    str: str,
}
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Path: "a path",
    tuple[str, ...]: "texts with commas between them",
    NoneType: "none",
}


def read_options(words: Sequence[str], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read what was given to ``--set``, each value as the type its field has.

    Args:
        words: ``TASK.FIELD=VALUE`` each; of two for one field the last counts.
        tasks: names that may be set.

    Returns:
        Task -> field -> value. Fields that a task does not have are left for it to refuse.

    Raises:
        ValueError: for words of another form, other tasks, or values that are none of the field's type.

    Example:
        >>> read_options(["pope.split=random", "pope.limit=none"], ["pope", "gqa"])
        {'pope': {'split': 'random', 'limit': None}}
    """
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        parts = re.fullmatch(r"([^.=]+)\.([^.=]+)=(.*)", word, re.DOTALL)
        if parts is None:
            raise ValueError(f"--set={word} must be TASK.FIELD=VALUE, for example pope.split=random")
        task, field, text = parts.groups()
        if task not in tasks:
            near = get_close_matches(task, tasks, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"these are {', '.join(tasks)}"
            raise ValueError(f"--set={word}: {task!r} is none of the tasks of this run; {hint}")
        found.setdefault(task, {})[field] = _value(word, task, field, text)
    return found


def _value(word: str, task: str, field: str, text: str) -> Any:
    from mmfast.eval.datasets import task_class

    hint = get_type_hints(task_class(task)).get(field, str)
    kinds = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    if NoneType in kinds and text.lower() == "none":
        return None
    readable = [kind for kind in kinds if kind in _READERS]
    for kind in readable:
        try:
            return _READERS[kind](text)
        except (ValueError, KeyError):
            continue
    if not readable:
        raise ValueError(f"--set={word}: {field} of {task!r} is an object of Python and cannot be written as text")
    legal = " or ".join(_NAMES[kind] for kind in kinds if kind in _NAMES)
    raise ValueError(f"--set={word}: {field} of {task!r} must be {legal}")
