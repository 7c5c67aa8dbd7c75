"""Say what works on this machine, what does not, and how to mend it."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from rich.table import Table

import mmfast
from mmfast.adapters import attention_backends, families, importable
from mmfast.cli import common
from mmfast.media.available import reader_states

_PACKAGES = (
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


def run(options: argparse.Namespace) -> int:
    """Examine and show."""
    found = examine()
    if options.json:
        common.write_json(found)
        return 0
    console = common.out()
    for title, rows in found.items():
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column("what")
        table.add_column("state", overflow="fold")
        for name, state in rows.items():
            table.add_row(name, state)
        console.print(table)
    return 0


def examine() -> dict[str, dict[str, str]]:
    """Return what was found: section -> item -> state in words."""
    common.quiet_libraries()
    return {
        "versions": _versions(),
        "devices": _devices(),
        "readers": reader_states(),
        "kernels": _kernels(),
        "attention": attention_backends(),
        "families": {name: importable(name) for name in families()},
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    found = {"mmfast": mmfast.__version__, "python": platform.python_version()}
    found.update({package: _installed(package) or "not installed" for package in _PACKAGES})
    if _installed("torchvision"):
        found["torchvision"] += _torchvision_state()
    return found


def _torchvision_state() -> str:
    """A torchvision built for another torch imports nowhere, and takes every vision model with it."""
    try:
        import_module("torchvision")
    except Exception as error:
        return (
            f" - BROKEN ({' '.join(str(error).split())[:90]}): every vision model fails to import. Uninstall it, or "
            "install the build that matches torch"
        )
    return " - works"


def _devices() -> dict[str, str]:
    found = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {platform.machine()}"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties: Any = torch.cuda.get_device_properties(index)
            found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        found["cuda"] = "none: torch sees no CUDA device" + (
            "" if torch.version.cuda else " (this torch is a CPU build)"
        )
    return found


def _kernels() -> dict[str, str]:
    """Triton compiles for GPUs; on the CPU it can only be interpreted, which proves but does not speed up."""
    if sys.platform != "linux" or find_spec("triton") is None:
        return {"triton": "not available: plain torch is used"}
    if torch.cuda.is_available():
        return {"triton": "can compile for this GPU; mmfast has no Triton kernels yet, plain torch is used"}
    return {"triton": "no GPU: only its interpreter runs here; plain torch is used"}
