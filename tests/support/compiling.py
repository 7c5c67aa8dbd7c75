"""Compile Triton kernels for a GPU that is not there: the interpreter takes much that the compiler refuses."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

SHARED = 99 * 1024
"""Bytes of shared memory that a program may take on every GPU since compute capability 8.0."""

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def compiling(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *kernels: str, capability: int = 90) -> list[str]:
    """Let launches of some kernels of a module compile instead, and note what was compiled.

    Each launch must fit the memory that programs share. Nothing is computed: results are uninitialised.
    """
    found: list[str] = []
    for name in kernels:
        monkeypatch.setattr(module, name, _Compiler(getattr(module, name), capability, found))
    return found


class _Compiler:
    def __init__(self, kernel: Any, capability: int, found: list[str]) -> None:
        self.kernel, self.capability, self.found = kernel, capability, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile with the types of what a launch was given."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | options
        constants = {one.name: given[one.name] for one in self.kernel.params if one.is_constexpr}
        signature = {
            one.name: "constexpr" if one.is_constexpr else _type(given[one.name]) for one in self.kernel.params
        }
        made = triton.compile(
            ASTSource(fn=self.kernel, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", self.capability, 32),
            options={name: value for name, value in options.items() if name in ("num_warps", "num_stages")},
        )
        name = self.kernel.__name__
        assert made.metadata.shared <= SHARED, f"{name} takes {made.metadata.shared} bytes of shared memory"
        self.found.append(name)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"
