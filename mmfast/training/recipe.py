"""Recipes: what is trained, on what, and how, in one TOML file."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmfast.training.compression import Compression
from mmfast.training.conversations import ConversationFile, Source, WorldSource
from mmfast.training.draft_heads.objective import DraftHead
from mmfast.training.draft_heads.options import HeadOptions
from mmfast.training.gates import Gates
from mmfast.training.objective import Objective
from mmfast.training.projectors import Projectors
from mmfast.training.settings import Settings
from mmfast.training.supervised import Supervised
from mmfast.zoo import EMBEDDED, is_embedded

_SECTIONS = ("model", "data", "objective", "settings")
_PATHS = ("file", "media")
# Fields of [data], by the kind of data they belong to.
_FILE, _WORLD = (*_PATHS, "frames"), ("world", "frames", "families", "questions")

Build = Callable[[Any, Any, Source, Mapping[str, Any]], Objective]


@dataclass(frozen=True)
class Recipe:
    """One run of training.

    Attributes:
        model: a hub id or folder, or ``"embedded"``.
        data: ``{"file": path, "media": folder, "frames": n}`` for conversations, ``{"world": true, "frames": n,
            "families": [...], "questions": n}`` for the rendered world.
        kind: a name of :data:`OBJECTIVES`.
        options: what that objective takes.
        settings: the numbers.

    Example:
        >>> recipe = Recipe.of({"objective": {"kind": "supervised"}, "settings": {"steps": 5, "batch": 2}})
        >>> recipe.model, recipe.settings.steps
        ('embedded', 5)
    """

    model: str
    data: Mapping[str, Any]
    kind: str
    options: Mapping[str, Any]
    settings: Settings

    @classmethod
    def read(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
        """Read a TOML file.

        Args:
            path: the file; paths of data in it are relative to its folder.
            changes: values that take the place of those in it, as ``{"settings.steps": 10}``; paths of data are
                relative to the working folder. ``data.file`` takes the place of the rendered world with all that is
                said of it, and ``data.world`` that of a file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no TOML or says what no recipe says, or a value that no field can have.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; give a recipe in TOML")
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no TOML: {error}") from None
        changes = changes or {}
        data = content.get("data", {})
        for key in _PATHS:
            if isinstance(data.get(key), str):
                data[key] = str(path.parent / data[key])
        replaced = _WORLD if "data.file" in changes else _PATHS if changes.get("data.world") is True else ()
        for key in set(replaced) - {"frames"}:
            data.pop(key, None)
        for name, value in changes.items():
            section, _, key = name.partition(".")
            if section not in _SECTIONS or not key:
                raise ValueError(f"{name!r} names no field; write for example settings.steps")
            content.setdefault(section, {})[key] = value
        return cls.of(content)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Recipe:
        """Check the content of a recipe.

        Raises:
            ValueError: naming the field that is unknown, with the nearest known one, missing, or of no legal value.
        """
        _known(content, _SECTIONS, "section")
        model = content.get("model", {})
        _known(model, ("path",), "field of [model]")
        _check_type("path", model.get("path", EMBEDDED), str, "a text")
        data = content.get("data", {"world": True})
        _check_data(data)
        objective = dict(content.get("objective", {}))
        kind = objective.pop("kind", "supervised")
        _known({kind: 0}, tuple(OBJECTIVES), "kind of objective")
        settings = content.get("settings", {})
        _known(settings, tuple(field.name for field in fields(Settings)), "field of [settings]")
        for name in ("steps", "batch"):
            if name not in settings:
                raise ValueError(f"[settings] must say {name}")
        return cls(model.get("path", EMBEDDED), data, kind, objective, Settings(**settings))

    @property
    def about(self) -> dict[str, Any]:
        """What decides how the run goes, beside the settings: ``{"objective.kind": "voco", ...}``.

        Example:
            >>> Recipe.of({"data": {"world": True, "frames": 2}, "settings": {"steps": 5, "batch": 2}}).about
            {'model.path': 'embedded', 'data.world': True, 'data.frames': 2, 'objective.kind': 'supervised'}
        """
        # The same file, wherever the command is given.
        data = {key: str(Path(value).resolve()) if key in _PATHS else value for key, value in self.data.items()}
        tables = {"model": {"path": self.model}, "data": data, "objective": {"kind": self.kind, **self.options}}
        return {f"{table}.{name}": value for table, row in tables.items() for name, value in row.items()}

    @property
    def changes_model(self) -> bool:
        """Whether weights of the model itself learn, and not only parts beside it."""
        beside = self.kind in ("draft_head", "gates", "projector")
        return bool(self.options.get("trained", "plan" if beside else "all") != "plan")

    def build(self) -> Objective:
        """Load the model and the data, and make the objective.

        A model that learns does so in float32, whatever its file holds; mixed precision is a matter of
        ``settings.precision``.
        """
        import mmfast
        from mmfast.adapters import load_pretrained

        if is_embedded(self.model):
            model, processor = mmfast.load_default(self.model)
        else:
            # The steps of a trained weight are often smaller than bfloat16 can tell; what stays as it is may stay so.
            model, processor = load_pretrained(self.model, dtype="float32" if self.changes_model else None)
        return OBJECTIVES[self.kind](model, processor, self.source(), self.options)

    def source(self) -> Source:
        """Open the data."""
        if "file" in self.data:
            return ConversationFile(
                self.data["file"],
                self.data.get("media"),
                frames=self.data.get("frames", 8),
                seed=self.settings.seed,
                on_bad=self.settings.on_bad,
            )
        return WorldSource(
            self.data.get("frames", 1),
            self.data.get("families"),
            self.settings.seed,
            questions=self.data.get("questions", 1),
        )


def _supervised(model: Any, processor: Any, source: Source, options: Mapping[str, Any]) -> Objective:
    _known(options, ("plan", "trained"), "field of [objective]")
    if options.get("trained") == "plan":
        raise ValueError("trained='plan' is for kind 'gates' or 'projector'; 'supervised' teaches the model itself")
    return Supervised(model, processor, source, **options)


def _voco(model: Any, processor: Any, source: Source, options: Mapping[str, Any]) -> Objective:
    taught = ("loss", "kd_weight", "temperature", "part_weight", "part_share", "part_layers", "trained")
    _known(options, ("tokens", "hide_prefix", "distinct", *taught), "field of [objective]")
    return Compression(model, processor, source, **options)


def _gates(model: Any, processor: Any, source: Source, options: Mapping[str, Any]) -> Objective:
    _known(options, ("plan", "trained", "model_rate"), "field of [objective]")
    if "plan" not in options:
        raise ValueError("[objective] of kind 'gates' must say plan, such as \"dynamic_llava(keep=0.2)\"")
    return Gates(model, processor, source, **options)


def _projector(model: Any, processor: Any, source: Source, options: Mapping[str, Any]) -> Objective:
    _known(options, ("method", "keep", "per_step", "trained", "model_rate"), "field of [objective]")
    if not {"method", "keep"} <= set(options):
        raise ValueError("[objective] of kind 'projector' must say method and keep, such as \"m3_pool()\" and [4, 16]")
    return Projectors(model, processor, source, **options)


def _draft_head(model: Any, processor: Any, source: Source, options: Mapping[str, Any]) -> Objective:
    _known(options, tuple(field.name for field in fields(HeadOptions)), "field of [objective]")
    return DraftHead(model, processor, source, HeadOptions(**options))


OBJECTIVES: dict[str, Build] = {
    "draft_head": _draft_head,
    "supervised": _supervised,
    "gates": _gates,
    "projector": _projector,
    "voco": _voco,
}
"""Kind of objective -> what makes it from model, processor, data and options."""


def _check_data(data: Mapping[str, Any]) -> None:
    """Refuse data that are of no kind or of both, and values that no field can have."""
    _known(data, tuple(dict.fromkeys((*_FILE, *_WORLD))), "field of [data]")
    world = data.get("world", False)
    _check_type("world", world, bool, "true or false")
    if world is ("file" in data):
        raise ValueError(f"[data] must say either file or world = true, not {'both' if world else 'neither'}")
    for name in data:
        if name not in (_WORLD if world else ("world", *_FILE)):
            raise ValueError(
                f"{name}={data[name]!r} is of no use for {'the world' if world else 'a file'}; leave it out"
            )
    for name in {*_PATHS} & {*data}:
        _check_type(name, data[name], str, "a path")
    for name in {"frames", "questions"} & {*data}:
        if isinstance(data[name], bool) or not isinstance(data[name], int) or data[name] < 1:
            raise ValueError(f"{name}={data[name]!r} must be an int of at least 1")
    families = data.get("families", [])
    if not isinstance(families, list | tuple) or not all(isinstance(family, str) for family in families):
        raise ValueError(f"families={families!r} must be a list of names")


def _check_type(name: str, value: object, kind: type, legal: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name}={value!r} must be {legal}")


def _known(found: Mapping[str, Any], legal: tuple[str, ...], what: str) -> None:
    for name in found:
        if name not in legal:
            near = difflib.get_close_matches(name, legal, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name!r} is no {what}; legal are {', '.join(legal)}{hint}")
