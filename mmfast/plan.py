"""Plan: which method acts at which stage, in text, as objects or in a file."""

from __future__ import annotations

import ast
import itertools
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfast.budget import LanguageShape, Prediction, prefill_flops, shares
from mmfast.kv.base import Evictor, Packer
from mmfast.registry import EXAMPLE, STACKING_STAGES, STAGES, build, get, parse_node, parse_text
from mmfast.token_pruning.base import BeforeLLM, Method
from mmfast.token_pruning.layers import LayerBypass, LayerDropper


@dataclass(frozen=True)
class Plan:
    """An ordered set of methods, at most one per stage unless the stage stacks.

    Attributes:
        methods: the methods, sorted by stage (their order inside a stage is kept).

    Raises:
        TypeError: if an element is no method object.
        ValueError: if two methods claim the same stage.

    Example:
        >>> Plan.parse("pyramiddrop() + divprune(keep=64)").to_text()
        'divprune(keep=64) + pyramiddrop()'
    """

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        for method in self.methods:
            if not isinstance(method, Method) or not hasattr(method, "stage"):
                raise TypeError(
                    f"a plan holds registered method objects, got {type(method).__name__}; write {EXAMPLE} or build "
                    "one with mmfast.registry.get(name).method(...)"
                )
        ordered = sorted(self.methods, key=lambda method: STAGES.index(method.stage))
        for first, second in itertools.combinations(ordered, 2):
            if (first.stage, first.role) == (second.stage, second.role) and first.stage not in STACKING_STAGES:
                raise ValueError(
                    f"methods {first.name!r} and {second.name!r} both act at stage {first.stage!r}, which takes one; "
                    "remove one of them"
                )
        object.__setattr__(self, "methods", tuple(ordered))

    @staticmethod
    def of(plan: PlanLike) -> Plan:
        """Build a plan from text, a plan, method objects, a mapping or the path of a TOML/JSON file.

        Raises:
            TypeError, ValueError: saying what is wrong with it.
            FileNotFoundError: if a path does not exist.

        Example:
            >>> Plan.of("random(keep=0.5)") == Plan.of([get("random").method(keep=0.5)])
            True
        """
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, Method):
            return Plan((plan,))
        if isinstance(plan, Path):
            return Plan.load(plan)
        if isinstance(plan, str):
            return Plan.load(Path(plan)) if plan.endswith((".toml", ".json")) else Plan.parse(plan)
        if isinstance(plan, Mapping):
            return Plan.from_dict(plan)
        if isinstance(plan, Iterable):
            return Plan(tuple(plan))
        raise TypeError(
            f"plan must be text such as {EXAMPLE}, a Plan, a list of methods or a file, got {type(plan).__name__}"
        )

    @staticmethod
    def parse(text: str) -> Plan:
        """Read the text form: methods joined by ``+``, options as keywords with literal values.

        ``"full"`` (or an empty text) is the empty plan.

        Raises:
            ValueError: naming the place that cannot be read, the unknown method or option.

        Example:
            >>> Plan.parse("fastv(layer=2, keep=0.5)").methods[0].layer
            2
        """
        if text.strip() in ("", "full"):
            return Plan()
        tree = parse_text(text)
        return Plan(tuple(parse_node(node, text) for node in _terms(tree)))

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """Read the form of plan files: ``{"method": [{"name": ..., option: value, ...}, ...]}``.

        Example:
            >>> Plan.from_dict({"method": [{"name": "uniform", "keep": 64}]}).to_text()
            'uniform(keep=64)'
        """
        entries = data.get("method")
        if set(data) != {"method"} or not isinstance(entries, Sequence) or isinstance(entries, str):
            raise ValueError(
                "a plan file holds a list named 'method' and nothing else, one [[method]] table with a 'name' each; "
                f"found {', '.join(map(repr, data)) or 'nothing'}"
            )
        built = []
        for entry in entries:
            if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
                raise ValueError(f"each [[method]] needs a 'name' (text), got {entry!r}")
            built.append(build(entry["name"], {k: v for k, v in entry.items() if k != "name"}))
        return Plan(tuple(built))

    @staticmethod
    def load(path: Path) -> Plan:
        """Read a plan file; the ending says whether it is TOML or JSON.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it cannot be read as a plan.
        """
        if not path.is_file():
            raise FileNotFoundError(f"plan file {str(path)!r} does not exist")
        try:
            text = path.read_text(encoding="utf-8")
            data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"plan file {str(path)!r} is not valid {path.suffix[1:].upper()}: {error}") from None
        if not isinstance(data, Mapping):
            raise ValueError(f"plan file {str(path)!r} must hold a table with a list named 'method'")
        return Plan.from_dict(data)

    def to_text(self) -> str:
        """Write the text form, which :meth:`parse` reads back; the empty plan is ``"full"``."""
        return " + ".join(method.to_text() for method in self.methods) or "full"

    def to_dict(self) -> dict[str, Any]:
        """Write the form of plan files, every option named."""
        return {"method": [{"name": method.name, **method.options()} for method in self.methods]}

    def save(self, path: Path) -> None:
        """Write a plan file that :meth:`load` reads back; the ending says whether it is TOML or JSON.

        Raises:
            ValueError: if the ending is neither, or an option is None against its default, for which TOML has no word.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> with TemporaryDirectory() as folder:
            ...     path = Path(folder) / "plan.toml"
            ...     Plan.parse("fastv(layer=3, keep=64)").save(path)
            ...     path.read_text().splitlines()[:2], Plan.load(path).to_text()
            (['[[method]]', 'name = "fastv"'], 'fastv(keep=64, layer=3)')
        """
        if path.suffix == ".toml":
            text = "\n".join(_toml_table(method) for method in self.methods) or "method = []\n"
        elif path.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        else:
            raise ValueError(f"plan file {str(path)!r} must end in .toml or .json")
        path.write_text(text, encoding="utf-8")

    def keep_counts(
        self, visual: int, text: int, shape: LanguageShape, *, images: int = 1, bytes_per_value: int = 2
    ) -> Prediction | None:
        """Predict tokens per layer, FLOPs and cache size without running the model.

        Args:
            visual: visual tokens the model makes of the prompt's images or videos, newline tokens not
                counted, in equal parts.
            text: all other tokens of the prompt.
            shape: sizes of the language model.
            images: how many images or videos there are.
            bytes_per_value: 2 for half precision, 4 for float32.

        Returns:
            The prediction, or None where a method leaves the count to the data or to the shape of the
            image, or where frames are chosen.

        Example:
            >>> llava = LanguageShape(32, 4096, 11008, 32, 32, 128)
            >>> found = Plan.parse("divprune(keep=128) + fastv(layer=2, keep=64)").keep_counts(576, 64, llava)
            >>> found.entered, found.layer_average, round(found.flops / found.full_flops, 3)
            (128, 68.0, 0.202)
        """
        if self.at("frames"):
            # How many frames the visual tokens stand for is not said.
            return None
        entered = visual
        for before in self.at("before_llm"):
            if isinstance(before, BeforeLLM):
                if before.keep is None or before.fits_grid:
                    return None
                entered = shared_count(entered, images, before.keep_count)
        alive = [entered + text] * shape.layers
        for method in self.at("in_llm"):
            if isinstance(method, LayerDropper):
                left = method.keep_counts(entered, text, shape.layers, images)
                if left is None:
                    return None
                alive = left
        attending, mode = alive, "skip"
        for method in self.at("in_llm"):
            if isinstance(method, LayerBypass):
                taking_part = method.keep_counts(entered, text, shape.layers, images)
                if taking_part is None:
                    return None
                attending, mode = [min(pair) for pair in zip(alive, taking_part, strict=True)], method.bypass
        shown = alive if mode == "freeze" else attending
        fed = alive if mode == "attention" else attending
        full = visual + text
        cached = list(shown)
        for method in self.at("in_llm"):
            # Where earlier caches are cut, they hold what is alive behind the cut.
            for event, first, last in method.truncations(shape.layers) if isinstance(method, LayerDropper) else ():
                cached[first:last] = [min(count, alive[event]) for count in cached[first:last]]
        held = _held(self.at("cache"), cached, text)
        return Prediction(
            entered=entered,
            tokens_per_layer=tuple(attending),
            layer_average=sum(attending) / shape.layers - text,
            flops=sum(
                shape.layer_flops(count, seen, projected=seen, fed=through)
                for count, seen, through in zip(attending, shown, fed, strict=True)
            ),
            full_flops=prefill_flops(shape, [full] * shape.layers),
            kv_bytes=None if held is None else shape.kv_bytes(held, bytes_per_value),
            full_kv_bytes=shape.kv_bytes([full] * shape.layers, bytes_per_value),
        )

    @property
    def reads_question(self) -> bool:
        """Whether what survives depends on the question, so that a later one finds what the first left.

        Example:
            >>> Plan.parse("divprune(keep=64)").reads_question, Plan.parse("snapkv()").reads_question
            (False, True)
        """
        return any(method.reads_question for method in self.methods)

    def at(self, stage: str) -> tuple[Method, ...]:
        """Return the methods that act at ``stage``."""
        return tuple(method for method in self.methods if method.stage == stage)


PlanLike = str | Path | Plan | Method | Mapping[str, Any] | Iterable[Method]
"""Everything :meth:`Plan.of` understands."""


def shared_count(total: int, items: int, count: Callable[[int], int]) -> int:
    """Add up what is kept of ``total`` tokens in ``items`` equal parts, which decide one by one.

    Example:
        >>> shared_count(100, 2, lambda tokens: min(tokens, 30))
        60
    """
    return sum(count(part) for part in shares(total, [1] * items) if part)


def _held(methods: Iterable[Method], shown: list[int], text: int) -> list[int] | None:
    """Predict the entries that each layer's cache holds per head; None where the data decide, or they are packed."""
    held = shown
    for method in methods:
        if isinstance(method, Packer):
            return None
        if isinstance(method, Evictor):
            counts = [
                method.entry_counts(max(0, count - text), min(count, text), layer, len(shown))
                for layer, count in enumerate(held)
            ]
            known = [count for count in counts if count is not None]
            if len(known) < len(counts):
                return None
            held = known
    return held


def _toml_table(method: Method) -> str:
    """Write one method of a plan file, every option named but those that are None by default."""
    lines = ["[[method]]", f"name = {_toml_value(method.name)}"]
    defaults = get(method.name).options
    for option, value in method.options().items():
        if value is None and defaults[option] is None:
            continue
        if value is None:
            raise ValueError(f"method {method.name!r}: TOML cannot write {option}=None; save the plan as .json")
        lines.append(f"{option} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON text is TOML text, but for one control character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_toml_value, value))}]"
    return repr(value)


def _terms(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return [node]
