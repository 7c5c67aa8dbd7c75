"""Check golden vectors against the installed package.

    python tests/check_golden.py DIR

DIR holds folders of files with inputs and expected outputs: one per registry name with ``.npz`` files, each
checked by the function ``check(case)`` of ``golden_checkers/<folder>.py``, and folders of ``.json`` files that
differ in kind, each checked by the one of ``golden_checkers/<folder>/<file>.py``. A check raises AssertionError
on a mismatch. One line is printed per file; the exit status is 1 if any file does not match.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Case = Any  # a dict of arrays, or whatever a json file holds
_CHECKERS = Path(__file__).parent / "golden_checkers"


def checker(path: Path) -> Callable[[Case], None] | None:
    """Load the checker of a vector file, or None if there is none."""
    kind = Path(path.parent.name, path.stem) if path.suffix == ".json" else Path(path.parent.name)
    source = _CHECKERS / f"{kind}.py"
    if not source.is_file():
        return None
    spec = importlib.util.spec_from_file_location("_".join(("golden_checkers", *kind.parts)), source)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    found: Callable[[Case], None] = module.check
    return found


def load(path: Path) -> Case:
    """Read the inputs and expected outputs of a vector file."""
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def files(root: Path) -> list[Path]:
    """List every vector file below ``root``, sorted."""
    return sorted(path for path in root.glob("*/*") if path.suffix in (".npz", ".json"))


def check_file(path: Path) -> tuple[str, str]:
    """Check one file.

    Returns:
        ``"passed"``, ``"failed"`` or ``"no checker"``, and what was found.
    """
    check = checker(path)
    if check is None:
        return "no checker", ""
    try:
        check(load(path))
    except AssertionError as error:
        return "failed", " ".join(str(error).split())[:200] or "mismatch"
    except Exception as error:  # an unreadable file or a crash is a failure of that file, not of the run
        return "failed", f"{type(error).__name__}: {error}"
    return "passed", ""


def main(argv: list[str] | None = None) -> int:
    """Run the checks and print the result."""
    parser = argparse.ArgumentParser(description="Check golden vectors against the installed package.")
    parser.add_argument("directory", type=Path, help="folder with sub-folders of vector files")
    root: Path = parser.parse_args(argv).directory
    if not root.is_dir():
        parser.error(f"{root} is no folder")
    tally: dict[str, int] = {"passed": 0, "failed": 0, "no checker": 0}
    for path in files(root):
        result, detail = check_file(path)
        tally[result] += 1
        line: Any = f"{result:<10} {path.parent.name}/{path.name}"
        sys.stdout.write(f"{line}: {detail}\n" if detail else f"{line}\n")
    sys.stdout.write(f"{tally['passed']} passed, {tally['failed']} failed, {tally['no checker']} without a checker\n")
    return 1 if tally["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
