"""Learned parts of the trained methods: built when the sizes are known, filled from safetensors files.

A method that has learned parts carries an option ``weights``, the path of a safetensors file whose
tensors are named and shaped like the state dict of the method's module. Without a file the module
keeps its seeded initialisation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class Weighted(Protocol):
    """A method with learned parts."""

    @property
    def weights(self) -> str:
        """Path of a safetensors file, or empty."""


M = TypeVar("M", bound=nn.Module)

# What is built for a method lives as long as the method: nothing stays on a device once a plan is gone.
_READY: WeakKeyDictionary[Weighted, dict[tuple[Any, ...], tuple[tuple[int, int], nn.Module]]] = WeakKeyDictionary()


def check_path(weights: object) -> None:
    """Refuse a ``weights`` option that names no file.

    Raises:
        TypeError: if it is no text.
        ValueError: if there is no such file.

    Example:
        >>> check_path("")
        >>> check_path("nowhere.safetensors")
        Traceback (most recent call last):
        ValueError: weights='nowhere.safetensors' is no file; give the path of a safetensors file, or '' for none
    """
    if not isinstance(weights, str):
        raise TypeError(f"weights={weights!r} must be the path of a safetensors file as text, or '' for none")
    if weights and not Path(weights).is_file():
        raise ValueError(f"weights={weights!r} is no file; give the path of a safetensors file, or '' for none")


def read(path: str) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU; no other format is tried.

    Raises:
        ValueError: if the file is missing or damaged.

    Example:
        >>> read("nowhere.safetensors")
        Traceback (most recent call last):
        ValueError: weights='nowhere.safetensors' cannot be read as a safetensors file: ...
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights={path!r} cannot be read as a safetensors file: {error}") from None


def fill(module: nn.Module, tensors: dict[str, Tensor], path: str) -> None:
    """Copy tensors into a module of the same names and shapes.

    Args:
        module: takes the values, in its own dtype.
        tensors: name -> floating-point tensor.
        path: where they come from, for messages.

    Raises:
        ValueError: naming the tensor that is missing, superfluous, of another shape, not floating-point or
            not finite.

    Example:
        >>> fill(nn.Linear(2, 1), {"weight": torch.ones(1, 3), "bias": torch.zeros(1)}, "a.safetensors")
        Traceback (most recent call last):
        ValueError: weights='a.safetensors': 'weight' has shape (1, 3), but this model needs (1, 2)
    """
    wanted = module.state_dict()
    for found, others, what in ((wanted, tensors, "lacks"), (tensors, wanted, "holds the unknown")):
        names = [name for name in found if name not in others]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"weights={path!r} {what} {', '.join(map(repr, names[:3]))}{more}; this model needs exactly "
                f"{_listed(list(wanted))}"
            )
    for name, own in wanted.items():
        value = tensors[name]
        if value.shape != own.shape:
            raise ValueError(
                f"weights={path!r}: {name!r} has shape {tuple(value.shape)}, but this model needs {tuple(own.shape)}"
            )
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"weights={path!r}: {name!r} ({value.dtype}) must hold finite floating-point numbers")
    module.load_state_dict(tensors)


def seeded(build: Callable[..., M], *sizes: int) -> M:
    """Build a module with the same random values each time, in float32 on the CPU.

    The random state of the process stays as it was.

    Example:
        >>> torch.equal(seeded(nn.Linear, 4, 2).weight, seeded(nn.Linear, 4, 2).weight)
        True
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # Modules outlive the call that needs them first, and may be trained: they are no inference tensors.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            return build(*sizes)
    finally:
        torch.set_default_dtype(before)


def prepared(
    method: Weighted,
    build: Callable[..., M],
    sizes: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> M:
    """Return the learned part of a method for a model of these sizes, built once for as long as the method lives.

    Args:
        method: the method; its ``weights`` say which file fills the module.
        build: makes the module from ``sizes``.
        sizes: what is known of the model, such as its width and depth.
        device: where the module has to be.
        dtype: in what it computes.

    Returns:
        The module in evaluation mode, without gradients. It is read anew when the file has changed.

    Raises:
        ValueError: if the file does not fit.

    Example:
        >>> from mmfast.registry import get
        >>> method = get("gamma_mod").method()
        >>> part = prepared(method, nn.Linear, (8, 2), torch.device("cpu"))
        >>> part is prepared(method, nn.Linear, (8, 2), torch.device("cpu"))
        True
    """
    mine = _READY.setdefault(method, {})
    key = (build, sizes, device, dtype)
    stamp = _stamp(method.weights)
    if key not in mine or mine[key][0] != stamp:
        module = seeded(build, *sizes)
        if method.weights:
            fill(module, read(method.weights), method.weights)
        with torch.inference_mode(False):
            mine[key] = (stamp, module.to(device, dtype).eval().requires_grad_(False))
    return cast(M, mine[key][1])


def _stamp(path: str) -> tuple[int, int]:
    """What changes when a file does; its absence is left to :func:`read` to report."""
    if not path or not Path(path).is_file():
        return (0, 0)
    status = Path(path).stat()
    return (status.st_mtime_ns, status.st_size)


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)} tensors)"
