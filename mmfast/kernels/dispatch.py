"""Which form of an operation runs: plain torch or Triton, decided call by call."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton"]
BACKENDS: tuple[Backend, ...] = ("torch", "triton")

_LOG = logging.getLogger("mmfast.kernels")
_ASKED: ContextVar[Backend | None] = ContextVar("mmfast_kernels_backend", default=None)
_TOLD: set[tuple[str, str]] = set()
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Ask for one form of every operation while the context lasts.

    ``"triton"`` raises where an operation cannot run in Triton; without this context such a call falls back
    to torch and the reason is logged once.

    Args:
        backend: ``"torch"`` or ``"triton"``.

    Raises:
        ValueError: if there is no such form.

    Example:
        >>> with use("torch"):
        ...     chosen("attention_stats", "")
        'torch'
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(map(repr, BACKENDS))}")
    token = _ASKED.set(backend)
    try:
        yield
    finally:
        _ASKED.reset(token)


def chosen(operation: str, refusal: str) -> Backend:
    """Decide which form of an operation runs in this call.

    Args:
        operation: its name.
        refusal: why Triton cannot run it; empty where it can.

    Raises:
        RuntimeError: if Triton was asked for and cannot.
    """
    asked = _ASKED.get()
    if asked == "torch" or (asked is None and not refusal):
        return "torch" if asked else "triton"
    if not refusal:
        return "triton"
    if asked == "triton":
        raise RuntimeError(f"operation {operation!r} cannot run in Triton: {refusal}; leave kernels.use('triton') out")
    if (operation, refusal) not in _TOLD:
        _TOLD.add((operation, refusal))
        _LOG.info("%s runs in torch: %s", operation, refusal)
    return "torch"


def refusal_of(*tensors: Tensor | None) -> str:
    """Say why Triton cannot run on these tensors; empty where it can.

    What does not depend on an operation is checked: that Triton is there, the device, and that floating tensors
    have a dtype kernels are written for. Operations add their own limits.

    Example:
        >>> refusal_of(torch.zeros(2, dtype=torch.float64)) != ""
        True
    """
    missing = _missing()
    if missing:
        return missing
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            return f"no kernel for {str(tensor.dtype).removeprefix('torch.')}"
    kinds = {tensor.device.type for tensor in given}
    if len({tensor.device for tensor in given}) > 1:
        return "tensors on several devices"
    if kinds <= {"cuda"} or (kinds <= {"cpu"} and interpreted()):
        return ""
    return f"tensors on {', '.join(sorted(kinds))}"


def available() -> dict[str, str]:
    """Say of each operation what runs on this machine, as far as that does not depend on a call's arguments.

    Returns:
        Name -> ``"Triton"``, or ``"torch"`` with the reason.

    Example:
        >>> available()["attention_stats"].split(":")[0] in ("Triton", "torch")
        True
    """
    why = _missing()
    if not why and not torch.cuda.is_available() and not interpreted():
        why = "no GPU"
    found = {}
    for path in sorted(Path(__file__).parent.iterdir()):
        if (path / "__init__.py").is_file():
            own = why if (path / "triton.py").is_file() else "there is no Triton form"
            found[path.name] = f"torch: {own}" if own else "Triton"
    return found


@cache
def _missing() -> str:
    return "" if importlib.util.find_spec("triton") is not None else "Triton is not installed"


@cache
def interpreted() -> bool:
    """Whether Triton runs as an interpreter, on tensors of the CPU; for tests, and slow."""
    if _missing():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)
