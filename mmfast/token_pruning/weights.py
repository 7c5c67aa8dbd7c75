"""Learned parts of the trained methods: built when the sizes are known, filled from safetensors files.

A method that has learned parts carries an option ``weights``, the path of a safetensors file whose
tensors are named and shaped like the state dict of the method's module. Without a file the module
keeps its seeded initialisation. :class:`Lesson` is how such a method learns that it is being trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmfast.token_pruning.layers import LayerEvent, LayerTokens


class Weighted(Protocol):
    """A method with learned parts."""

    @property
    def weights(self) -> str:
        """Path of a safetensors file, or empty."""


@runtime_checkable
class Learner(Weighted, Protocol):
    """A method whose learned parts can be trained at work.

    In a training call the tokens it is given carry a :class:`Lesson` and their gradients. It then follows its
    training form and notes what its loss needs.
    """

    def learned(self, width: int, depth: int, device: torch.device) -> nn.Module:
        """Return what is learned for a model of hidden size ``width`` and ``depth`` layers, from :func:`taught`."""

    def training_loss(self, lesson: Lesson) -> Mapping[str, Tensor]:
        """Return what is added to the loss of the answers, weighed, under the same names after each call."""


@runtime_checkable
class MaskLearner(Learner, Protocol):
    """A dropper that hides tokens in training, instead of dropping them."""

    def training_mask(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Return ``[n]`` of 0 (from here on no other token sees this one) and 1, through which gradients pass."""


@dataclass
class Lesson:
    """One call of the model in training.

    Attributes:
        answers: ``[B, S]`` bool, which tokens are answers; None = the last token of each row ends the prompt.
        gates: learned parts follow their training form; otherwise methods act as in use.
        done: share of the training that is over, 0 to 1, for schedules.
        noise: draw decisions where the method's training draws; otherwise decide as in use, with the gradients of
            training.
        parts: in the first so many layers it is noted how far each compression token looks at its own part of what
            it reads, see :func:`mmfast.token_pruning.compression_base.own_parts`.
        notes: what methods note for their loss.
        figures: numbers for a log.

    Example:
        >>> lesson = Lesson(torch.tensor([[False, False, True], [False, False, False]]))
        >>> lesson.ends.tolist()
        [[1], [2]]
    """

    answers: Tensor | None = None
    gates: bool = False
    done: float = 0.0
    noise: bool = True
    parts: int = 0
    notes: dict[str, list[Any]] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def ends(self) -> Tensor | None:
        """Place of the last token of each prompt, ``[B, 1]`` int64: the one before its first answer."""
        if self.answers is None:
            return None
        first = self.answers.long().argmax(dim=1, keepdim=True)
        return torch.where(self.answers.any(dim=1, keepdim=True), first, self.answers.shape[1]) - 1

    def note(self, name: str, value: Any) -> None:
        """Keep something for the loss of this call."""
        self.notes.setdefault(name, []).append(value)

    def noted(self, name: str) -> list[Any]:
        """Return what was noted, in order."""
        return self.notes.get(name, [])


M = TypeVar("M", bound=nn.Module)

# What is built for a method is kept on the method: it lives as long, and no other method of equal options shares it.
_HOME = "_learned_parts"


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
        The module in evaluation mode, without gradients. It is read anew when the file has changed. Once
        :func:`taught` was asked for it, that one, in whatever mode and place it is.

    Raises:
        ValueError: if the file does not fit.

    Example:
        >>> from mmfast.registry import get
        >>> method = get("gamma_mod").method()
        >>> part = prepared(method, nn.Linear, (8, 2), torch.device("cpu"))
        >>> part is prepared(method, nn.Linear, (8, 2), torch.device("cpu"))
        True
    """
    mine = _parts(method)
    if (build, sizes) in mine:
        return cast(M, mine[build, sizes])
    key = (build, sizes, device, dtype)
    stamp = _stamp(method.weights)
    if key not in mine or mine[key][0] != stamp:
        module = seeded(build, *sizes)
        if method.weights:
            fill(module, read(method.weights), method.weights)
        with torch.inference_mode(False):
            mine[key] = (stamp, module.to(device, dtype).eval().requires_grad_(False))
    return cast(M, mine[key][1])


def taught(method: Weighted, build: Callable[..., M], sizes: tuple[int, ...], device: torch.device) -> M:
    """Return the learned part of a method for training; from then on the method works with this very module.

    Args:
        method: the method; its ``weights`` say where training begins.
        build: makes the module from ``sizes``.
        sizes: what is known of the model.
        device: where the module is at first; it may be moved.

    Example:
        >>> from mmfast.registry import get
        >>> method = get("gamma_mod").method()
        >>> part = taught(method, nn.Linear, (8, 2), torch.device("cpu"))
        >>> part is prepared(method, nn.Linear, (8, 2), torch.device("cpu"), torch.float16)
        True
    """
    mine = _parts(method)
    if (build, sizes) not in mine:
        mine[build, sizes] = prepared(method, build, sizes, device)
    return cast(M, mine[build, sizes])


def taught_so_far(method: Weighted) -> list[nn.Module]:
    """Return every learned part that has been built for a method, for training as :func:`taught` gives it.

    Example:
        >>> from mmfast.registry import get
        >>> method = get("gamma_mod").method()
        >>> part = prepared(method, nn.Linear, (8, 2), torch.device("cpu"))
        >>> taught_so_far(method) == [part]
        True
    """
    built = [key for key in _parts(method) if len(key) == 4]
    found = [taught(method, build, sizes, device) for build, sizes, device, _ in built]
    return list(dict.fromkeys(found))


def share_parts(method: Weighted, other: Weighted) -> None:
    """Let another method work with the learned parts of a method, those still to be built included.

    Example:
        >>> from mmfast.registry import get
        >>> few, many = get("gamma_mod").method(keep=0.2), get("gamma_mod").method(keep=0.4)
        >>> share_parts(few, many)
        >>> cpu = torch.device("cpu")
        >>> prepared(few, nn.Linear, (8, 2), cpu) is prepared(many, nn.Linear, (8, 2), cpu)
        True
    """
    object.__setattr__(other, _HOME, _parts(method))


def _parts(method: Weighted) -> dict[Any, Any]:
    """Return what has been built for a method."""
    if _HOME not in vars(method):
        object.__setattr__(method, _HOME, {})
    return cast(dict[Any, Any], vars(method)[_HOME])


def _stamp(path: str) -> tuple[int, int]:
    """What changes when a file does; its absence is left to :func:`read` to report."""
    if not path or not Path(path).is_file():
        return (0, 0)
    status = Path(path).stat()
    return (status.st_mtime_ns, status.st_size)


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)} tensors)"
