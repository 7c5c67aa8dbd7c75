"""Compile Triton kernels for a GPU that is not there: the interpreter takes much that the compiler refuses."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

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
"""Bytes of shared memory that a program may take on every GPU since compute capability 8.0."""


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


def compiling(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *kernels: str) -> list[str]:
    """Let launches of kernels compile instead, and note what was compiled.

    Each launch must fit the memory that programs share. Nothing is computed: results are uninitialised.

    Args:
        monkeypatch: puts the kernels back.
        module: where they are.
        kernels: their names; none for all whose name ends in ``_kernel``. What kernels call is none.
    """
    done: list[str] = []
    for name in kernels or [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, _Compiled(name, getattr(module, name), done))
    return done
