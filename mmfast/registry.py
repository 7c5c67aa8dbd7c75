"""The one registry of methods: names, stages, lazy imports and third-party entry points."""

from __future__ import annotations

import ast
import difflib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

STAGES = ("frames", "encoder", "before_llm", "in_llm", "cache", "decode")
"""The stages of one request, in the order in which they run."""

STACKING_STAGES = frozenset({"encoder"})
"""Stages in which a plan may hold more than one method of a role."""

_ROOMS = (
    "mmfast.token_pruning.frames",
    "mmfast.token_pruning.before_llm",
    "mmfast.token_pruning.in_llm",
    "mmfast.token_pruning.compression",
    "mmfast.kv.eviction",
    "mmfast.kv.retrieval",
    "mmfast.kv.packing",
    "mmfast.speculative.drafters",
)
_ACTIONS = {
    "FrameSelector": "skips",
    "LayerBypass": "reroutes",
    "LayerMask": "masks",
    "Compressor": "compresses",
    "Adjuster": "adjusts",
    "Forgetter": "forgets",
    "Retriever": "reads a part",
    "Packer": "packs",
    "Drafter": "drafts",
}
"""Kind of method -> what it does, where that is neither dropping nor merging."""
EXAMPLE = '"divprune(keep=64) + pyramiddrop()"'
"""A plan, for messages that say how to write one."""

_ENTRY_POINTS = "mmfast.methods"
_REGISTERED: dict[str, MethodInfo] = {}

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a registered method.

    Attributes:
        name: registry name, equal to the file name of the method.
        stage: one of :data:`STAGES`.
        kind: name of the base class that says how the method decides (``Selector``, ``LayerDropper``, ...).
        summary: first line of the method's docstring.
        paper: arXiv number or venue; empty for baselines.
        source: the repository whose code the numerics were checked against; empty for baselines.
        training_free: whether the method runs without any learned weights.
        vectors: whether the numerics are tested against input and output vectors of the official code.
        merges: whether survivors take over something of what was dropped.
        reads_question: whether the text decides what survives, so that in later turns the choice of the
            first question stays.
        needs: names of the signals the method asks the model for.
        options: parameter name -> default value.
        method: the class itself; ``info.method(keep=64)`` builds one.
    """

    name: str
    stage: str
    kind: str
    summary: str
    paper: str
    source: str
    training_free: bool
    vectors: bool
    merges: bool
    reads_question: bool
    needs: tuple[str, ...]
    options: dict[str, Any]
    method: type

    @property
    def action(self) -> str:
        """What happens to a token that is not worth it, in one word such as ``drops`` or ``merges``."""
        return _ACTIONS.get(self.kind) or ("merges" if self.merges else "drops")

    @property
    def turns(self) -> str:
        """What later turns of a chat see: ``any question`` or what the ``first question`` left; empty for drafters."""
        if self.stage == "decode":
            return ""
        return "first question" if self.reads_question else "any question"

    @property
    def positions(self) -> str:
        """The position policies: ``keep`` and, where the model allows it, ``compact``; the default first.

        Drafters take nothing out and have none.
        """
        if self.stage == "decode":
            return ""
        if "positions" not in self.options:
            return "keep"
        default = self.options["positions"] or ("compact" if self.stage in ("frames", "before_llm") else "keep")
        return "compact, keep" if default == "compact" else "keep, compact"


def register(
    name: str,
    *,
    stage: str,
    paper: str = "",
    source: str = "",
    training_free: bool = True,
    vectors: bool = False,
) -> Callable[[C], C]:
    """Register a method class under ``name``; use as a class decorator.

    Args:
        name: registry name (snake_case, equal to the file name).
        stage: one of :data:`STAGES`.
        paper: arXiv number or venue of the paper.
        source: ``owner/repository`` of the official code.
        training_free: whether it runs without learned weights.
        vectors: whether ``tests/golden/<name>/`` holds vectors of the official code.

    Raises:
        ValueError: if the name is not snake_case, is taken, or the stage is unknown.

    Example:
        >>> from dataclasses import dataclass
        >>> from mmfast.token_pruning.base import Scorer
        >>> @register("doctest_energy", stage="before_llm")
        ... @dataclass(frozen=True)
        ... class Energy(Scorer):
        ...     '''Keep the tokens of largest norm.'''
        ...     def score(self, tokens):
        ...         return tokens.features.float().norm(dim=-1)
        >>> get("doctest_energy").summary
        'Keep the tokens of largest norm.'
        >>> unregister("doctest_energy")
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"method name {name!r} must be a lower-case identifier such as 'divprune'")
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} of method {name!r} must be one of {', '.join(STAGES)}")

    def add(method: C) -> C:
        if name in _REGISTERED and _REGISTERED[name].method is not method:
            raise ValueError(f"method name {name!r} is already registered by {_REGISTERED[name].method!r}")
        kind = next(base.__name__ for base in method.__mro__ if "kind" in vars(base))
        _REGISTERED[name] = MethodInfo(
            name=name,
            stage=stage,
            kind=kind,
            summary=(method.__doc__ or "").strip().split("\n")[0].replace("``", ""),
            paper=paper,
            source=source,
            training_free=training_free,
            vectors=vectors,
            merges=bool(getattr(method, "merges", False)),
            reads_question=bool(getattr(method, "reads_question", False)),
            needs=tuple(sorted(getattr(method, "needs", ()))),
            options={item.name: item.default for item in fields(method) if item.init} if is_dataclass(method) else {},
            method=method,
        )
        method.name = name  # type: ignore[attr-defined]
        method.stage = stage  # type: ignore[attr-defined]
        return method

    return add


def unregister(name: str) -> None:
    """Forget a method; for tests and notebooks that define one on the spot.

    Example:
        >>> unregister("never_registered")
    """
    _REGISTERED.pop(name, None)


@cache
def _built_in() -> dict[str, str]:
    """Registry name -> module, read from the file names of the method rooms without importing them."""
    return {
        module.name: f"{room}.{module.name}"
        for room in _ROOMS
        for module in pkgutil.iter_modules(import_module(room).__path__)
    }


def get(name: str) -> MethodInfo:
    """Look up one method by name, importing its module if needed.

    Raises:
        ValueError: if no such method exists; the message lists near matches.

    Example:
        >>> get("divprune").stage
        'before_llm'
    """
    if name not in _REGISTERED and name in _built_in():
        import_module(_built_in()[name])
    if name not in _REGISTERED:
        for point in entry_points(group=_ENTRY_POINTS):
            if point.name == name:
                point.load()
    if name not in _REGISTERED:
        known = sorted({*_REGISTERED, *_built_in(), *(p.name for p in entry_points(group=_ENTRY_POINTS))})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known methods: {', '.join(known)}"
        raise ValueError(f"unknown method {name!r}; {hint}")
    return _REGISTERED[name]


def methods(stage: str | None = None) -> list[MethodInfo]:
    """List every method, in the order of the stages, then by name.

    Args:
        stage: only the methods of this stage.

    Raises:
        ValueError: if the stage is unknown.

    Example:
        >>> [info.name for info in methods("in_llm") if info.action == "reroutes"]
        ['gamma_mod', 'p_mod', 'saisa', 'shortv', 'zipvl']
    """
    if stage is not None and stage not in STAGES:
        raise ValueError(f"stage {stage!r} must be one of {', '.join(STAGES)}")
    for name in (*_built_in(), *(point.name for point in entry_points(group=_ENTRY_POINTS))):
        get(name)
    found = [info for info in _REGISTERED.values() if stage in (None, info.stage)]
    return sorted(found, key=lambda info: (STAGES.index(info.stage), info.name))


def parse_text(text: str) -> ast.expr:
    """Read the text form of a plan, or of one method, as an expression.

    Raises:
        ValueError: if it is none.

    Example:
        >>> type(parse_text("divprune(keep=64)")).__name__
        'Call'
    """
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"plan {text!r} cannot be read; write it like {EXAMPLE}") from None


def parse_node(node: ast.expr, text: str) -> Any:
    """Build the method that an expression such as ``divprune(keep=64)`` names.

    Args:
        node: the expression.
        text: all of the text, for messages.

    Raises:
        ValueError: naming the place that cannot be read, the unknown method or option.
    """
    if isinstance(node, ast.Name):
        return build(node.id, {})
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"plan {text!r}: {ast.unparse(node)!r} is no method; write it like {EXAMPLE}")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"plan {text!r}: options of {node.func.id!r} need names, for example {node.func.id}(keep=64)")
    options = {}
    for keyword in node.keywords:
        try:
            options[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:
            raise ValueError(
                f"plan {text!r}: {keyword.arg}={ast.unparse(keyword.value)} must be a literal "
                "(number, quoted text, True, None or a tuple)"
            ) from None
    return build(node.func.id, options)


def build(name: str, options: dict[str, Any]) -> Any:
    """Build a method from its name and options.

    Raises:
        TypeError, ValueError: naming the method, and the option that is unknown or the value that is not legal.

    Example:
        >>> build("divprune", {"keep": 64}).keep
        64
    """
    info = get(name)
    for option in options:
        if option not in info.options:
            near = difflib.get_close_matches(option, info.options, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"options: {', '.join(info.options)}"
            raise ValueError(f"method {name!r} has no option {option!r}; {hint}")
    try:
        return info.method(**options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"method {name!r}: {error}") from None
