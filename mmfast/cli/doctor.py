"""Say what works on this machine, what does not, and how to mend it."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from mmfast.cli import common

PACKAGES = (
    "mmfast",
    "torch",
    "transformers",
    "triton",
    "einops",
    "numpy",
    "pillow",
    "av",
    "decord",
    "torchcodec",
    "torchvision",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command (none but the common ones)."""


def run(options: argparse.Namespace) -> None:
    """Examine and show."""
    with common.working("examining"):
        found = examine()
    if options.json:
        common.write_json(found)
        return
    from rich.table import Table

    console = common.console()
    for title, states in found.items():
        table = Table(
            title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False
        )
        table.add_column("what", min_width=17)
        table.add_column("state", overflow="fold")
        shared = title == "families" and "works" in states.values()
        for what, state in _by_state(states) if shared else states.items():
            table.add_row(what, state)
        console.print(table)
        console.print()


def examine() -> dict[str, dict[str, str]]:
    """Return what was found: section -> item -> state in words."""
    common.quiet_libraries()
    sections: dict[str, Callable[[], dict[str, str]]] = {
        "versions": _versions,
        # Before the families: an import of transformers that fails half-way changes what torchvision says.
        "torchvision": _torchvision,
        "devices": _devices,
        "readers": _readers,
        "kernels": _kernels,
        "attention": _attention,
        "families": _families,
    }
    return {title: _survive(look) for title, look in sections.items()}


def _survive(look: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What is broken may break in any way, and the other sections still have something to say."""
    try:
        return look()
    except Exception as error:
        return {"cannot be examined": f"{type(error).__name__}: {_short(error)}"}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    return found | {package: _installed(package) or "not installed" for package in PACKAGES}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torchvision() -> dict[str, str]:
    """A torchvision that was built for another torch breaks every vision model on import."""
    if find_spec("torchvision") is None:
        return {"state": "not installed; needed only by processors with a video slot and by Pixtral's"}
    try:
        import_module("torchvision")
    except Exception as error:
        return {
            "state": f"installed but BROKEN ({_short(error)}): every vision model fails to import",
            "cure": f"pip uninstall torchvision, or install {_matching_torchvision()} from the same index as torch",
        }
    return {"state": "works"}


def _matching_torchvision() -> str:
    """Name the torchvision that belongs to the installed torch: 2.0 came with 0.15, and both count on from there."""
    numbers = (_installed("torch") or "").split(".")[:2]
    if len(numbers) == 2 and numbers[0] == "2" and numbers[1].isdecimal():
        return f"torchvision 0.{int(numbers[1]) + 15}"
    return "the torchvision that belongs to this torch"


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used by torch"}
    if not torch.cuda.is_available():
        build = "" if torch.version.cuda else ": this torch is a CPU build"
        return found | {"cuda": f"torch sees no CUDA device{build}"}
    for index in range(torch.cuda.device_count()):
        device: Any = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    return found


def _readers() -> dict[str, str]:
    from mmfast.media.available import reader_states

    return reader_states()


def _kernels() -> dict[str, str]:
    """Triton compiles for GPUs; on a CPU it can only be interpreted, which proves but does not speed up."""
    import torch

    from mmfast.kernels import available

    if find_spec("triton") is None:
        why = "" if sys.platform == "linux" else f": there is no release for {sys.platform}"
        state = f"not installed{why}; plain torch is used"
    elif not torch.cuda.is_available():
        state = "no GPU: its kernels can only be interpreted (TRITON_INTERPRET=1); plain torch is used"
    else:
        state = "can compile for this GPU"
    runs: dict[str, list[str]] = {}
    for operation, where in available().items():
        runs.setdefault(where, []).append(operation)
    return {"triton": state} | {f"in {where}": ", ".join(operations) for where, operations in runs.items()}


def _attention() -> dict[str, str]:
    from mmfast.adapters import attention_backends

    return attention_backends()


def _families() -> dict[str, str]:
    from mmfast.adapters import families, importable

    return {name: importable(name) for name in families()}


def _by_state(states: dict[str, str]) -> list[tuple[str, str]]:
    """Turn name -> state round, for families most of which share one; a long state needs the wide column."""
    found: dict[str, list[str]] = {}
    for name, state in states.items():
        found.setdefault(state, []).append(name)
    return [("works" if state == "works" else "fails", _listed(names, state)) for state, names in found.items()]


def _listed(names: list[str], state: str) -> str:
    return ", ".join(names) + ("" if state == "works" else f" - {state}")


def _short(error: Exception) -> str:
    return common.one_line(str(error))[:120]
