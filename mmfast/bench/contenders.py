"""What can be run on one model and prompt: the model itself, mmfast with a plan, another library in a runner file."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import mmfast
from mmfast.bench.timing import Clock
from mmfast.report import Report

RUNNER_FUNCTIONS = {"build": 1, "prefill": 1, "decode": 2}
"""What a runner file defines -> how many arguments it is called with."""


@dataclass(frozen=True)
class Case:
    """What a contender gets: a model of its own that shares its weights with all others, and a prompt.

    Attributes:
        name: what the model has the shape of.
        scale: how far it is shrunken; ``"real"`` is not.
        model: the Hugging Face model; whatever is done to it concerns nobody else.
        inputs: what ``generate`` takes.
        batch: rows.
        device: where it runs.
        dtype: of the weights.
    """

    name: str
    scale: str
    model: nn.Module
    inputs: Mapping[str, Tensor]
    batch: int
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Sample:
    """One request.

    Attributes:
        first_token: seconds to the first token of all rows.
        per_token: seconds per step after it.
        peak_bytes: most memory held, weights included; 0 where it cannot be told.
        report: what mmfast did, if it was there.
    """

    first_token: float
    per_token: float
    peak_bytes: int = 0
    report: Report | None = None


class Contender(Protocol):
    """Something that answers prompts."""

    @property
    def name(self) -> str:
        """How results call it."""
        ...

    def start(self, case: Case, new_tokens: int) -> Callable[[], Sample]:
        """Get ready, and return what answers the prompt once with so many tokens, and times it."""
        ...


class _Marks:
    """A stopping criterion that stops nothing: it notes when the first token is there."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.first: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.first is None:
            self.first = self._clock.now()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _generating(case: Case, new_tokens: int, **options: Any) -> Callable[[], tuple[float, float]]:
    clock = Clock(case.device)

    def run() -> tuple[float, float]:
        marks = _Marks(clock)
        begin = clock.now()
        case.model.generate(  # type: ignore[operator]
            **case.inputs, max_new_tokens=new_tokens, do_sample=False, stopping_criteria=[marks], **options
        )
        end = clock.now()
        if marks.first is None:
            raise RuntimeError("generate() ended without a token, so there is nothing to time")
        return marks.first - begin, (end - marks.first) / max(1, new_tokens - 1)

    return run


@dataclass(frozen=True)
class Untouched:
    """The model as transformers runs it.

    Attributes:
        attention: attention implementation.
        reads_attention: whether attention is asked for, as methods that need it do without kernels.
    """

    attention: str = "sdpa"
    reads_attention: bool = False

    @property
    def name(self) -> str:
        """The implementation, and whether attention is read."""
        return f"hf {self.attention}{', attention read' if self.reads_attention else ''}"

    def start(self, case: Case, new_tokens: int) -> Callable[[], Sample]:
        """Switch the attention implementation."""
        case.model.set_attn_implementation(self.attention)  # type: ignore[operator]
        options = {"output_attentions": True, "return_dict_in_generate": True} if self.reads_attention else {}
        run = _generating(case, new_tokens, **options)
        return lambda: Sample(*run())


@dataclass(frozen=True)
class Planned:
    """The model with a plan of mmfast.

    Attributes:
        plan: the plan in text form.
        compiled: whether it is compiled too.
    """

    plan: str
    compiled: bool = False

    @property
    def name(self) -> str:
        """The plan, and whether it is compiled."""
        return f"{self.plan}{', compiled' if self.compiled else ''}"

    def start(self, case: Case, new_tokens: int) -> Callable[[], Sample]:
        """Accelerate the model for good."""
        fast = mmfast.accelerate(case.model, self.plan, compile=self.compiled)
        run = _generating(case, new_tokens)

        def sample() -> Sample:
            times = run()
            report = fast.report()
            if report.compilation is not None and report.compilation.failure:
                # What ran is not what the results would say.
                raise RuntimeError(str(report.compilation))
            return Sample(*times, report=report)

        return sample


@dataclass(frozen=True)
class FromFile:
    """Whatever a runner file runs.

    Attributes:
        name: its ``NAME``, or the name of the file.
        module: the file.
    """

    name: str
    module: ModuleType

    def start(self, case: Case, new_tokens: int) -> Callable[[], Sample]:
        """Let it build what it needs."""
        state, clock = self.module.build(case), Clock(case.device)

        def run() -> Sample:
            begin = clock.now()
            prefilled = self.module.prefill(state)
            first = clock.now()
            self.module.decode(prefilled, new_tokens - 1)
            return Sample(first - begin, (clock.now() - first) / max(1, new_tokens - 1))

        return run


def load_runner(path: Path) -> FromFile:
    """Read a runner file: another library beside mmfast, on the same models and prompts.

    It is Python and runs as such. It defines ``build(case)``, which gets a :class:`Case` and returns anything;
    ``prefill(state)``, which gets that, reads the prompt and finds the first token of each row, and returns anything;
    and ``decode(prefilled, tokens)``, which gets that and generates so many tokens more, whatever they are. ``NAME``
    is what results call it.

    Args:
        path: the file.

    Raises:
        ValueError: if it cannot be read, or does not define what it should.

    Example:
        >>> load_runner(Path("nowhere.py"))
        Traceback (most recent call last):
        ValueError: runner nowhere.py is no file; name a Python file that defines build, prefill and decode
    """
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"runner {path} is no file; name a Python file that defines build, prefill and decode")
    spec = importlib.util.spec_from_file_location(f"mmfast_runner_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"runner {path} cannot be imported; name a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"runner {path} cannot be imported: {type(error).__name__}: {error}") from error
    for name, count in RUNNER_FUNCTIONS.items():
        function = getattr(module, name, None)
        if not callable(function):
            raise ValueError(f"runner {path} does not define {name}(); it must define build, prefill and decode")
        try:
            inspect.signature(function).bind(*range(count))
        except TypeError:
            raise ValueError(f"runner {path}: {name}() must take {count} argument{'s' * (count > 1)}") from None
    return FromFile(str(getattr(module, "NAME", path.stem)), module)


def sharing_weights(model: nn.Module) -> nn.Module:
    """Copy a model without its weights, which both have: what is done to one does not show in the other.

    Example:
        >>> one = nn.Linear(2, 2)
        >>> other = sharing_weights(one)
        >>> other is one, other.weight is one.weight
        (False, True)
    """
    shared = {id(weight): weight for weight in model.parameters()}
    return copy.deepcopy(model, shared)
