"""Where kernels can run in tests, and what uninitialised memory holds there.

Mark with ``interpreter`` what launches a Triton kernel: it runs on a GPU, or on the CPU in a process that was started
with ``TRITON_INTERPRET=1`` (see test_interpreter.py). Everything else runs in any process, in plain torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast.kernels import dispatch
from support.compiling import compiling


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_not()
    for item in items:
        if reason and item.get_closest_marker("interpreter"):
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_not() -> str:
    if dispatch._missing():
        return "Triton is not installed"
    if dispatch.interpreted() or torch.cuda.is_available():
        return ""
    return "Triton needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs these in a process that has it"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels can run in this process; the CPU where none can."""
    return torch.device("cuda" if torch.cuda.is_available() and not dispatch.interpreted() else "cpu")


@pytest.fixture
def compile_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Compile kernels for a GPU that need not be there, instead of launching them.

    The interpreter takes Python that no compiler does. Given the module of an operation's Triton form, and names of
    kernels, their launches do nothing but compile from then on; the list that is returned grows by the name of each.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if dispatch.interpreted():
        pytest.skip("kernels are interpreted in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # Some releases warn where their default for this is not confirmed.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    return partial(compiling, monkeypatch)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what is left uninitialised: a kernel that forgets to write a place shows."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            made = allocate(*args, **kwargs)
            if made.is_floating_point():
                return made.fill_(float("nan"))
            return made.fill_(True if made.dtype == torch.bool else torch.iinfo(made.dtype).max)

        return allocated

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, poison(getattr(Tensor, name)))
