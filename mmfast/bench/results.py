"""The results of one machine and day in one file, written after every cell; what is in it is not measured again."""

from __future__ import annotations

import json
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_SOFTWARE = ("mmfast", "torch", "transformers", "triton")


def machine_of(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the versions that figures depend on.

    Example:
        >>> machine_of(torch.device("cpu"))["kind"]
        'cpu'
    """
    return {
        "kind": device.type,
        "device": _device_name(device),
        "threads": 1 if device.type == "cpu" else torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        **{name: _version(name) for name in _SOFTWARE},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if (info.exists())
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def default_path(folder: Path, device: torch.device) -> Path:
    """Name the file of this machine and day.

    Example:
        >>> default_path(Path("results"), torch.device("cpu")).name.startswith("bench-cpu-")
        True
    """
    name = "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", _device_name(device).lower()).strip("-")
    return folder / f"bench-{name}-{datetime.now(UTC):%Y-%m-%d}.json"


class Results:
    """A file of cells.

    Attributes:
        path: the file.
        content: what is in it: ``machine``, ``calls`` and ``cells``.

    Args:
        path: a new file, or one that an earlier call began.
        machine: what :func:`machine_of` returned.

    Raises:
        ValueError: if the file is no such file, or of another machine or other versions.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"machine": machine, "calls": [], "cells": {}}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return
        self.content = _read(path)
        other = {name for name, value in machine.items() if self.content["machine"].get(name) != value}
        if other:
            name = sorted(other)[0]
            raise ValueError(
                f"{path} was measured with {name}={self.content['machine'].get(name)!r}, and this is "
                f"{name}={machine[name]!r}: figures of both in one file could not be told apart; name another file"
            )

    def finished(self, key: str) -> bool:
        """Say whether a cell need not be measured again; one that failed is tried once more in each call."""
        return "failed" not in self.content["cells"].get(key, {"failed": ""})

    def begin(self, **facts: Any) -> None:
        """Note that a call began, and what it found at its start."""
        self.content["calls"].append({"began": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}", **facts})
        self.write()

    def add(self, key: str, cell: dict[str, Any]) -> None:
        """Add a cell and write the file."""
        self.content["cells"][key] = {**cell, "call": len(self.content["calls"]) - 1}
        self.write()

    def write(self) -> None:
        """Write the file, so that whoever stops the process finds the old or the new one, whole."""
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as results: {error}; name another file") from None
    if not isinstance(content, dict) or not {"machine", "calls", "cells"} <= content.keys():
        raise ValueError(f"{path} holds no results of mmfast bench; name another file")
    return content
