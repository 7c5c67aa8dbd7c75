"""The world of coloured shapes: what a scene holds and how one is drawn by lot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

WORLD_VERSION = 1
"""Raised whenever the same seed would give another scene, picture or question."""

CANVAS = 224
GRID = 16
PATCH = CANVAS // GRID

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (35, 165, 60),
    "blue": (45, 75, 225),
    "yellow": (240, 220, 40),
    "purple": (150, 45, 190),
    "orange": (245, 135, 25),
    "cyan": (45, 205, 215),
    "white": (245, 245, 245),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring", "moon", "heart")
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

RADIUS = (9, 30)
LARGE_FROM = 17
TEXT_SIZE = (22, 36)
ANGLES = (0, 12, -12, 24, -24)

_MARGIN = 2
_ATTEMPTS = 60


@dataclass(frozen=True)
class Item:
    """One object of a scene.

    Attributes:
        ident: number of the object, unique inside its scene; what questions and owner maps refer to.
        kind: one of :data:`SHAPES`, or ``"text"``.
        color: a key of :data:`COLORS`.
        x, y: centre in canvas pixels.
        radius: nominal radius of a shape, or the font size of a text tag.
        angle: rotation of a shape in degrees.
        text: the characters of a text tag.
    """

    ident: int
    kind: str
    color: str
    x: int
    y: int
    radius: int
    angle: int = 0
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind != "text" and self.kind not in SHAPES:
            raise ValueError(f"kind must be 'text' or one of {SHAPES}, got {self.kind!r}.")
        if self.color not in COLORS:
            raise ValueError(f"color must be one of {tuple(COLORS)}, got {self.color!r}.")
        if self.radius < 1:
            raise ValueError(f"radius must be at least 1 pixel, got {self.radius}.")
        if (self.kind == "text") != bool(self.text):
            raise ValueError(f"text must be given for kind 'text' and for no other, got {self.text!r}.")
        if set(self.text) - set(CHARACTERS):
            raise ValueError(f"text may hold the characters {CHARACTERS} only, got {self.text!r}.")

    @property
    def is_text(self) -> bool:
        """Whether this is a text tag."""
        return self.kind == "text"

    @property
    def size(self) -> str:
        """``"small"`` or ``"large"``; meant for shapes."""
        return "large" if self.radius >= LARGE_FROM else "small"

    @property
    def half_extent(self) -> tuple[int, int]:
        """Half the width and half the height of the box kept free for this object, in pixels."""
        if self.is_text:
            return math.ceil(len(self.text) * character_pitch(self.radius) / 2) + 2, math.ceil(self.radius / 2)
        return self.radius, self.radius


@dataclass(frozen=True)
class Scene:
    """Objects on a background.

    Attributes:
        items: the objects; their boxes do not overlap in drawn scenes.
        backdrop: seed of the procedural background; None for plain grey.

    Example:
        >>> scene = Scene((Item(0, "star", "red", 60, 60, 20),))
        >>> scene.shapes[0].size
        'large'
    """

    items: tuple[Item, ...]
    backdrop: int | None = None

    @property
    def shapes(self) -> tuple[Item, ...]:
        """The objects that are not text."""
        return tuple(item for item in self.items if not item.is_text)

    @property
    def texts(self) -> tuple[Item, ...]:
        """The text tags."""
        return tuple(item for item in self.items if item.is_text)


def character_pitch(size: int) -> int:
    """Pixels from one character of a text tag to the next at a font size."""
    return round(0.75 * size)


def overlaps(one: Item, other: Item, gap: int = _MARGIN) -> bool:
    """Whether the boxes of two objects come closer than ``gap`` pixels to each other."""
    (w1, h1), (w2, h2) = one.half_extent, other.half_extent
    return abs(one.x - other.x) < w1 + w2 + gap and abs(one.y - other.y) < h1 + h2 + gap


def sample_items(rng: np.random.Generator, num_shapes: int, num_texts: int) -> list[Item]:
    """Draw objects without places: all lie at (0, 0) until they are put somewhere.

    Most scenes draw colours and shapes without replacement. Otherwise the mix of a scene gives away
    the answer to "what color is the star?" without a look at the star.
    """
    if rng.random() < 0.65:
        kinds = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:num_shapes]]
        colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[:num_shapes]]
    else:
        pool = rng.permutation(len(SHAPES))[: int(rng.integers(1, 5))]
        kinds = [SHAPES[int(rng.choice(pool))] for _ in range(num_shapes)]
        pool = rng.permutation(len(COLORS))[: int(rng.integers(2, 9))]
        colors = [list(COLORS)[int(rng.choice(pool))] for _ in range(num_shapes)]
    low, high = math.log(RADIUS[0]), math.log(RADIUS[1] + 1)
    items = [
        Item(
            ident,
            kind,
            color,
            x=0,
            y=0,
            radius=min(RADIUS[1], int(math.exp(rng.uniform(low, high)))),
            angle=int(rng.choice(ANGLES)),
        )
        for ident, (kind, color) in enumerate(zip(kinds, colors, strict=True))
    ]
    for ident in range(num_shapes, num_shapes + num_texts):
        text = "".join(CHARACTERS[i] for i in rng.integers(len(CHARACTERS), size=int(rng.integers(1, 4))))
        color = list(COLORS)[int(rng.integers(len(COLORS)))]
        size = int(rng.integers(TEXT_SIZE[0], TEXT_SIZE[1] + 1))
        items.append(Item(ident, "text", color, x=0, y=0, radius=size, text=text))
    return items


def sample_scene(rng: np.random.Generator, *, num_shapes: int | None = None, num_texts: int | None = None) -> Scene:
    """Draw a scene of 1-7 shapes and 0-2 text tags whose boxes do not overlap.

    Args:
        rng: the source of chance; equal states give equal scenes.
        num_shapes: so many shapes, at most; None draws the number.
        num_texts: so many text tags, at most; None draws the number.

    Returns:
        The scene. Objects that find no free place are left out, so crowded scenes may hold fewer.

    Example:
        >>> a, b = (sample_scene(np.random.default_rng(3)) for _ in range(2))
        >>> a == b
        True
    """
    backdrop = int(rng.integers(2**31))
    drawn = int(rng.integers(1, 8)), int(rng.choice(3, p=(0.3, 0.5, 0.2)))
    shapes, texts = (own if given is None else given for own, given in zip(drawn, (num_shapes, num_texts), strict=True))
    items = sample_items(rng, shapes, texts)
    placed: list[Item] = []
    # Large things first: a tag of three letters rarely fits once the canvas has filled up.
    for item in sorted(items, key=lambda i: -i.half_extent[0]):
        put = _place(rng, item, placed)
        if put is not None:
            placed.append(put)
    return Scene(tuple(sorted(placed, key=lambda i: i.ident)), backdrop)


def moved(item: Item, x: int, y: int) -> Item:
    """The same object at another place."""
    return Item(item.ident, item.kind, item.color, x, y, item.radius, item.angle, item.text)


def _place(rng: np.random.Generator, item: Item, placed: list[Item]) -> Item | None:
    width, height = item.half_extent
    for _ in range(_ATTEMPTS):
        x = int(rng.integers(width + _MARGIN, CANVAS - width - _MARGIN + 1))
        y = int(rng.integers(height + _MARGIN, CANVAS - height - _MARGIN + 1))
        candidate = moved(item, x, y)
        if not any(overlaps(candidate, other) for other in placed):
            return candidate
    return None
