"""Where kernels can run in tests, and what uninitialised memory holds there.

Mark with ``interpreter`` what launches a Triton kernel: it runs on a GPU, or on the CPU in a process that was started
with ``TRITON_INTERPRET=1`` (see test_interpreter.py). Everything else runs in any process, in plain torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast.kernels import dispatch


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
def compile_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[ModuleType], list[str]]:
    """Compile kernels for a GPU that need not be there, instead of launching them.

    The interpreter takes Python that no compiler does. Given the module of an operation's Triton form, its launches
    do nothing but compile from then on; the list that is returned grows by the name of each kernel compiled.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if dispatch.interpreted():
        pytest.skip("kernels are interpreted in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # Some releases warn where their default for this is not confirmed.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    from triton.runtime.jit import JITFunction

    done: list[str] = []

    def replace(module: ModuleType) -> list[str]:
        for name, kernel in vars(module).copy().items():
            if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, _Compiled(name, kernel, done))
        return done

    return replace


_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
_SHARED = 99 * 1024


class _Compiled:
    """Stands in for a kernel."""

    def __init__(self, name: str, kernel: Any, done: list[str]) -> None:
        self.name, self.kernel, self.done = name, kernel, done

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        launch = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, hints = {}, {}, {}
        plain = {(place,) for place, own in enumerate(self.kernel.params) if own.do_not_specialize}

        def kind(path: tuple[int, ...], value: Any) -> Any:
            """Say what the compiler is told of an argument, as a launch would."""
            if isinstance(value, tuple):
                return tuple(kind((*path, place), part) for place, part in enumerate(value))
            if isinstance(value, Tensor):
                hints[path] = [["tt.divisibility", 16]]
                return _POINTERS[value.dtype]
            if isinstance(value, float):
                return "fp32"
            # A one becomes part of the code, unless that was ruled out; inside of tuples it cannot be.
            if isinstance(value, int) and (value != 1 or path in plain):
                return "i32"
            constants[path] = value
            return "constexpr"

        for place, parameter in enumerate(self.kernel.params):
            value = given.get(parameter.name, parameter.default)
            if parameter.is_constexpr:
                signature[parameter.name], constants[(place,)] = "constexpr", value
            else:
                signature[parameter.name] = kind((place,), value)
        source = ASTSource(self.kernel, signature, constants, hints)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
        assert made.metadata.shared <= _SHARED, f"{self.name} needs {made.metadata.shared} bytes of shared memory"
        self.done.append(self.name)


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
