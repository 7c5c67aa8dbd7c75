"""Questions about scenes, their answers, and how an answer is scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mmfast.eval.datasets.shapes.scene import CANVAS, COLORS, SHAPES, Item, Scene

T = TypeVar("T")

CORE_FAMILIES: tuple[str, ...] = ("exist", "color", "shape", "size", "where", "read")
"""What the embedded model answers best, and what its accuracy is the mean of."""

EXTRA_FAMILIES: tuple[str, ...] = ("count", "rel", "more", "most", "caption")
"""Counting, comparing and describing."""

FAMILIES = CORE_FAMILIES + EXTRA_FAMILIES

_WHERE_MARGIN = 8
_REL_GAP = 20
_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        family: one of :data:`FAMILIES`, or a family of clips.
        text: the question, lower case.
        answer: the expected answer.
        object_ids: ``ident`` of every object the answer depends on; empty where nothing is to be found.
    """

    family: str
    text: str
    answer: str
    object_ids: tuple[int, ...]


def ask(scene: Scene, rng: np.random.Generator, families: Sequence[str] = CORE_FAMILIES) -> list[Question]:
    """Make at most one question of each family.

    Args:
        scene: what is asked about.
        rng: chooses among possible questions and their wordings.
        families: which families, in the order of the answer.

    Returns:
        The questions; a family is left out where the scene allows no unambiguous question of it.

    Raises:
        ValueError: for an unknown family.

    Example:
        >>> scene = Scene((Item(0, "star", "red", 40, 40, 20),))
        >>> ask(scene, np.random.default_rng(0), ["where"])[0].answer
        'top left'
    """
    check_families(families, FAMILIES)
    asked = []
    for family in families:
        question = _MAKERS[family](scene, rng)
        if question is not None:
            text, answer, items = question
            asked.append(Question(family, text, answer, tuple(sorted(item.ident for item in items))))
    return asked


def check_families(families: Sequence[str], known: Sequence[str]) -> None:
    """Refuse family names that are not known.

    Raises:
        ValueError: naming the unknown ones and the legal ones.
    """
    unknown = [family for family in families if family not in known]
    if unknown or not families:
        raise ValueError(f"families must be some of {tuple(known)}, got {tuple(families)}.")


def score(prediction: str, answer: str) -> bool:
    """Whether a prediction is the answer, letter case and a full stop at the end aside.

    Example:
        >>> score(" Top right .", "top right"), score("right", "top right")
        (True, False)
    """
    return _plain(prediction) == _plain(answer)


def references(scene: Scene) -> list[tuple[Item, str]]:
    """Objects that a phrase names without doubt, each with its shortest phrase first.

    Returns:
        Pairs of object and phrase, as ``(item, "red star")``.

    Example:
        >>> scene = Scene((Item(0, "star", "red", 40, 40, 20), Item(1, "star", "blue", 90, 90, 20)))
        >>> [phrase for _, phrase in references(scene)]
        ['red star', 'blue star']
    """
    kinds = Counter(item.kind for item in scene.items)
    pairs = Counter((item.color, item.kind) for item in scene.items)
    found = []
    for item in scene.items:
        if kinds[item.kind] == 1:
            found.append((item, item.kind))
        if pairs[item.color, item.kind] == 1:
            found.append((item, f"{item.color} {item.kind}"))
    return found


_Draft = tuple[str, str, Iterable[Item]]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _exist(scene: Scene, rng: np.random.Generator) -> _Draft | None:
    if not scene.shapes:
        return None
    yes = rng.random() < 0.5
    style = rng.choice(3, p=(0.4, 0.45, 0.15))
    if style == 0:
        there = {item.kind for item in scene.shapes}
        options = [kind for kind in SHAPES if (kind in there) is yes]
        thing = _pick(rng, options) if options else None
        items = [item for item in scene.shapes if item.kind == thing]
    elif style == 1:
        thing, items = _colored_shape(scene, rng, yes)
    else:
        # A coloured text tag is no shape, but nobody should have to decide that.
        there = {item.color for item in (scene.shapes if yes else scene.items)}
        options = [color for color in COLORS if (color in there) is yes]
        color = _pick(rng, options) if options else None
        thing = f"{color} shape" if color else None
        items = [item for item in scene.shapes if item.color == color]
    if thing is None:
        return None
    article = "an" if thing[0] in "aeiou" else "a"
    opening = _pick(rng, ("is there", "can you see", "does the image contain"))
    return f"{opening} {article} {thing}?", "yes" if yes else "no", items


def _colored_shape(scene: Scene, rng: np.random.Generator, yes: bool) -> tuple[str | None, list[Item]]:
    """A colour with a shape: one that is there, or one that shares its colour or shape with some object."""
    one = _pick(rng, scene.shapes)
    if yes:
        return f"{one.color} {one.kind}", [i for i in scene.shapes if (i.color, i.kind) == (one.color, one.kind)]
    there = {(item.color, item.kind) for item in scene.shapes}
    near = [(one.color, kind) for kind in SHAPES] + [(color, one.kind) for color in COLORS]
    options = [pair for pair in near if pair not in there]
    return (" ".join(_pick(rng, options)), []) if options else (None, [])


def _color(scene: Scene, rng: np.random.Generator) -> _Draft | None:
    options = [(item, phrase) for item, phrase in references(scene) if phrase == item.kind]
    if not options:
        return None
    item, phrase = _pick(rng, options)
    opening = _pick(rng, ("what color is", "what is the color of"))
    return f"{opening} the {phrase}?", item.color, [item]


def _shape(scene: Scene, rng: np.random.Generator) -> _Draft | None:
    colors = Counter(item.color for item in scene.items)
    options = [item for item in scene.shapes if colors[item.color] == 1]
    if not options:
        return None
    item = _pick(rng, options)
    opening = _pick(rng, ("what shape is", "what is the shape of"))
    return f"{opening} the {item.color} object?", item.kind, [item]


def _size(scene: Scene, rng: np.random.Generator) -> _Draft | None:
    # Near the border between small and large, one pixel would decide.
    options = [(i, p) for i, p in references(scene) if not i.is_text and not 15 <= i.radius <= 18]
    if not options:
        return None
    item, phrase = _pick(rng, options)
    return f"is the {phrase} small or large?", item.size, [item]


def place(x: float, y: float) -> str | None:
    """Name the cell of a 3 x 3 grid, or None within a few pixels of a line between two cells.

    Example:
        >>> place(112, 112), place(112, 10), place(74, 10)
        ('center', 'top', None)
    """
    third = CANVAS / 3
    if any(abs(v - line) < _WHERE_MARGIN for v in (x, y) for line in (third, 2 * third)):
        return None
    words = (_ROWS[int(y // third)], _COLUMNS[int(x // third)])
    return " ".join(filter(None, words)) or "center"


def _where(scene: Scene, rng: np.random.Generator) -> _Draft | None:
    options = [(i, phrase, cell) for i, phrase in references(scene) if (cell := place(i.x, i.y)) is not None]
    if not options:
        return None
    item, phrase, cell = _pick(rng, options)
    return f"where is the {phrase}?", cell, [item]


def _read(scene: Scene, rng: np.random.Generator) -> _Draft | None:
    if not scene.texts:
        return None
    if len(scene.texts) == 1:
        item = scene.texts[0]
        question = _pick(rng, ("what does the text say?", "what is written in the image?", "read the text."))
    else:
        options = [i for i, phrase in references(scene) if phrase == f"{i.color} text"]
        if not options:
            return None
        item = _pick(rng, options)
        question = f"what does the {item.color} text say?"
    return question, " ".join(item.text), [item]


def _count(scene: Scene, rng: np.random.Generator) -> _Draft | None:
    style = int(rng.integers(3))
    if style == 0:
        kind = _pick(rng, SHAPES)
        thing, items = _plural(kind), [item for item in scene.shapes if item.kind == kind]
    elif style == 1:
        color = _pick(rng, tuple(COLORS))
        thing, items = f"{color} shapes", [item for item in scene.shapes if item.color == color]
    else:
        thing, items = "shapes", list(scene.shapes)
    return f"how many {thing} are there?", str(len(items)), items


def _rel(scene: Scene, rng: np.random.Generator) -> _Draft | None:
    named = references(scene)
    pairs = [
        (one, other, a, b)
        for one, a in named
        for other, b in named
        if one.ident != other.ident and max(abs(one.x - other.x), abs(one.y - other.y)) >= _REL_GAP
    ]
    if not pairs:
        return None
    one, other, a, b = _pick(rng, pairs)
    axes = [axis for axis in "xy" if abs(getattr(one, axis) - getattr(other, axis)) >= _REL_GAP]
    if _pick(rng, axes) == "x":
        question, before, after, first = "left or right of", "left", "right", one.x < other.x
    else:
        question, before, after, first = "above or below", "above", "below", one.y < other.y
    return f"is the {a} {question} the {b}?", before if first else after, [one, other]


def _more(scene: Scene, rng: np.random.Generator) -> _Draft | None:
    counts = Counter(item.kind for item in scene.shapes)
    kinds = [*counts, _pick(rng, SHAPES)]
    one, other = _pick(rng, kinds), _pick(rng, SHAPES)
    if one == other or counts[one] == counts[other]:
        return None
    if rng.random() < 0.5:
        one, other = other, one
    items = [item for item in scene.shapes if item.kind in (one, other)]
    answer = "yes" if counts[one] > counts[other] else "no"
    return f"are there more {_plural(one)} than {_plural(other)}?", answer, items


def _most(scene: Scene, rng: np.random.Generator) -> _Draft | None:
    what = _pick(rng, ("shape", "color"))
    ranking = Counter(i.kind if what == "shape" else i.color for i in scene.shapes).most_common(2)
    if len(ranking) < 2 or ranking[0][1] == ranking[1][1]:
        return None
    return f"what is the most common {what}?", ranking[0][0], scene.shapes


def _caption(scene: Scene, rng: np.random.Generator) -> _Draft | None:
    del rng
    if not scene.items:
        return None
    rows = sorted(scene.items, key=lambda item: (item.y * 3 // CANVAS, item.x, item.y))
    parts = [
        f"the {item.color} text {' '.join(item.text)}" if item.is_text else f"a {item.size} {item.color} {item.kind}"
        for item in rows
    ]
    return "describe the image.", ", ".join(parts), rows


def _plural(kind: str) -> str:
    return kind + ("es" if kind == "cross" else "s")


_MAKERS: dict[str, Callable[[Scene, np.random.Generator], _Draft | None]] = {
    "exist": _exist,
    "color": _color,
    "shape": _shape,
    "size": _size,
    "where": _where,
    "read": _read,
    "count": _count,
    "rel": _rel,
    "more": _more,
    "most": _most,
    "caption": _caption,
}
