"""Which form of an operation runs: plain torch or Triton, decided call by call."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton"]
BACKENDS: tuple[Backend, ...] = ("torch", "triton")

_LOG = logging.getLogger("mmfast.kernels")
_ASKED: ContextVar[Backend | None] = ContextVar("mmfast_kernels_backend", default=None)
_TOLD: set[tuple[str, str]] = set()
_TELLING = Lock()
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Ask for one form of every operation while the context lasts, in this thread or asynchronous task.

    Contexts can be nested: the innermost holds. Code that ``torch.compile`` has traced keeps the form it was traced
    with. ``"triton"`` raises where an operation cannot run in Triton; without this context such a call falls back
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
    asked = _asked()
    if asked == "torch":
        return "torch"
    if not refusal:
        return "triton"
    if asked == "triton":
        raise RuntimeError(f"operation {operation!r} cannot run in Triton: {refusal}; leave kernels.use('triton') out")
    _tell(operation, refusal)
    return "torch"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tell(operation: str, refusal: str) -> None:
    """Log a reason the first time."""
    with _TELLING:
        new = (operation, refusal) not in _TOLD
        _TOLD.add((operation, refusal))
    if new:
        _LOG.info("%s runs in torch: %s", operation, refusal)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _asked() -> Backend | None:
    return _ASKED.get()


def refusal_of(*tensors: Tensor | None) -> str:
    """Say why Triton cannot run on these tensors; empty where it can.

    What does not depend on an operation is checked: that Triton is there, the device, and that floating tensors
    have a dtype kernels are written for. Operations add their own limits.

    Example:
        >>> refusal_of(torch.zeros(2, dtype=torch.float64)) != ""
        True
    """
    missing: str = _missing()
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


# Neither changes while a process lasts, so that a trace by torch.compile may take the answer as given; it looks
# through a cache, but not into these.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _missing() -> str:
    return "" if _installed() else "Triton is not installed"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def interpreted() -> bool:
    """Whether Triton runs as an interpreter, on tensors of the CPU; for tests, and slow."""
    return _installed() and _interprets()


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _interprets() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
