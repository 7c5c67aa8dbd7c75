"""Kernels: one folder per operation, with a plain reference beside the fast form and a dispatch between them.

    with mmfast.kernels.use("torch"):
        ...

Importing this package imports neither torch nor Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfast.kernels.dispatch import available, use

__all__ = ["available", "use"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmfast.kernels import dispatch

    return getattr(dispatch, name)
