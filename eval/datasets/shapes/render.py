"""Pictures of scenes, and which object owns which patch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mmfast.eval.datasets.shapes.scene import CANVAS, COLORS, GRID, PATCH, Item, Scene, character_pitch

_SUPERSAMPLE = 4
_COVERED = 0.10
_TEXT_WEIGHT = 0.9

Alpha = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Owners = NDArray[np.int16]


class Rendered(NamedTuple):
    """A picture and its owner map.

    Attributes:
        image: RGB picture, 224 x 224.
        owners: int16 ``[16, 16]``, the ``ident`` of the object in each patch, -1 for background.
    """

    image: Image.Image
    owners: Owners


def render(scene: Scene, background: Pixels | None = None) -> Rendered:
    """Draw a scene.

    Args:
        scene: what to draw.
        background: uint8 ``[224, 224, 3]`` to draw on; by default the scene's own. The array is copied.

    Returns:
        The picture and the owner map. An object owns a patch when it covers more than a tenth of it and
        more than any other does; the patch under its centre is always its own.

    Example:
        >>> from mmfast.eval.datasets.shapes.scene import Item
        >>> picture = render(Scene((Item(5, "star", "red", 63, 63, 12),)))
        >>> picture.image.size, int(picture.owners[4, 4]), int(picture.owners[0, 0])
        ((224, 224), 5, -1)
    """
    canvas = (draw_background(scene.backdrop) if background is None else background).copy()
    owners = np.full((GRID, GRID), -1, np.int16)
    most = np.full((GRID, GRID), _COVERED, np.float32)
    for item in scene.items:
        alpha, left, top = _mask(item)
        height, width = alpha.shape
        view = canvas[top : top + height, left : left + width]
        color = np.asarray(COLORS[item.color], np.float32)
        view[:] = np.rint(view + (color - view) * alpha[..., None]).astype(np.uint8)
        covered = _coverage(alpha, left, top)
        mine = covered > most
        owners[mine] = item.ident
        most[mine] = covered[mine]
    for item in scene.items:
        for x in _centres(item):
            owners[item.y // PATCH, x // PATCH] = item.ident
    return Rendered(Image.fromarray(canvas), owners)


def draw_background(seed: int | None) -> Pixels:
    """Draw a greyish background: flat, gradient or smooth noise, often with clutter and pixel noise.

    Args:
        seed: which background; None gives plain grey.

    Returns:
        uint8 ``[224, 224, 3]``.
    """
    if seed is None:
        return np.full((CANVAS, CANVAS, 3), 110, np.uint8)
    rng = np.random.default_rng(seed)
    style = rng.choice(3, p=(0.1, 0.15, 0.75))
    mean = rng.uniform(60, 145)
    luma = np.full((CANVAS, CANVAS), mean, np.float32)
    if style:
        cells = 2 if style == 1 else int(math.exp(rng.uniform(math.log(4), math.log(45))))
        field = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
        wave = np.asarray(field.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC), np.float32)
        luma += (wave - wave.mean()) * (rng.uniform(9, 24) / max(float(wave.std()), 1e-3))
    tint = rng.uniform(-9, 9, 3).astype(np.float32)
    picture: Pixels = np.clip(luma[..., None] + (tint - tint.mean()), 10, 200).astype(np.uint8)
    if rng.random() < 0.6:
        picture = _clutter(rng, picture)
    if rng.random() < 0.6:
        noise = rng.standard_normal((CANVAS, CANVAS), np.float32) * rng.uniform(2, 9)
        picture = np.clip(picture + noise[..., None], 0, 255).astype(np.uint8)
    return picture


def _clutter(rng: np.random.Generator, picture: Pixels) -> Pixels:
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 11))):
        x, y = (int(v) for v in rng.integers(0, CANVAS, 2))
        grey = rng.uniform(30, 150)
        ink = tuple(int(v) for v in np.clip(grey + rng.uniform(-10, 10, 3), 0, 255))
        if rng.random() < 0.5:
            angle, length = rng.uniform(0, math.tau), rng.uniform(8, 60)
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            pen.line((x, y, *end), fill=ink, width=int(rng.integers(1, 5)))
        else:
            width, height = rng.uniform(3, 13), rng.uniform(2, 9)
            pen.ellipse((x - width, y - height, x + width, y + height), fill=ink)
    cluttered: Pixels = np.asarray(image)
    return cluttered


def _coverage(alpha: Alpha, left: int, top: int) -> NDArray[np.float32]:
    """Share of each patch that a mask covers, ``[16, 16]``."""
    padded = np.zeros((CANVAS, CANVAS), np.float32)
    padded[top : top + alpha.shape[0], left : left + alpha.shape[1]] = alpha
    shares: NDArray[np.float32] = padded.reshape(GRID, PATCH, GRID, PATCH).mean(axis=(1, 3))
    return shares


def _centres(item: Item) -> list[int]:
    """Columns of the object's centre, or of the centre of each of its characters."""
    pitch = character_pitch(item.radius)
    return [round(item.x + (i - (len(item.text) - 1) / 2) * pitch) for i in range(len(item.text))] or [item.x]


def _mask(item: Item) -> tuple[Alpha, int, int]:
    """Coverage of an object, cut to the canvas, and the canvas pixel of its upper left corner."""
    if item.is_text:
        alpha, dx, dy = _text_mask(item.text, item.radius)
    else:
        alpha = _shape_mask(item.kind, item.radius, item.angle)
        dx = dy = -(alpha.shape[0] // 2)
    left, top = item.x + dx, item.y + dy
    x0, y0 = max(0, -left), max(0, -top)
    x1, y1 = min(alpha.shape[1], CANVAS - left), min(alpha.shape[0], CANVAS - top)
    return alpha[y0:y1, x0:x1], left + x0, top + y0


@lru_cache(maxsize=4096)
def _shape_mask(kind: str, radius: int, angle: int) -> Alpha:
    """Antialiased mask, square, with the object's centre in the middle."""
    half = radius + 3
    big = Image.new("L", (2 * half * _SUPERSAMPLE,) * 2)
    pen, middle, unit = ImageDraw.Draw(big), half * _SUPERSAMPLE, radius * _SUPERSAMPLE
    turn = math.radians(angle)

    def at(x: float, y: float) -> tuple[float, float]:
        along = (x * math.cos(turn) - y * math.sin(turn)) * unit
        return middle + along, middle + (x * math.sin(turn) + y * math.cos(turn)) * unit

    def polygon(*points: tuple[float, float]) -> None:
        pen.polygon([at(x, y) for x, y in points], fill=255)

    def disc(x: float, y: float, size: float, fill: int = 255) -> None:
        (cx, cy), reach = at(x, y), size * unit
        pen.ellipse((cx - reach, cy - reach, cx + reach, cy + reach), fill=fill)

    if kind == "circle":
        disc(0, 0, 0.88)
    elif kind == "ring":
        disc(0, 0, 0.88)
        disc(0, 0, 0.51, fill=0)
    elif kind == "square":
        polygon((-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78))
    elif kind == "triangle":
        polygon((0, -1), (0.92, 0.75), (-0.92, 0.75))
    elif kind == "star":
        spikes = [(1.0 if k % 2 == 0 else 0.42, k * math.pi / 5) for k in range(10)]
        polygon(*((r * math.sin(a), -r * math.cos(a)) for r, a in spikes))
    elif kind == "cross":
        polygon((-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3))
        polygon((-0.3, -0.95), (0.3, -0.95), (0.3, 0.95), (-0.3, 0.95))
    elif kind == "moon":
        disc(0, 0, 0.92)
        disc(0.53, -0.05, 0.77, fill=0)
    else:
        disc(-0.5, -0.3, 0.5)
        disc(0.5, -0.3, 0.5)
        polygon((-0.92, -0.06), (0, -0.4), (0.92, -0.06), (0, 0.94))
    return (np.asarray(big.reduce(_SUPERSAMPLE)) / 255).astype(np.float32)


@lru_cache(maxsize=4096)
def _text_mask(text: str, size: int) -> tuple[Alpha, int, int]:
    """Mask of a text tag and where its upper left corner lies from the centre of the tag."""
    pitch, middle = character_pitch(size), size
    width = pitch * len(text) + size
    plate = Image.new("L", (width, 2 * size))
    pen, font = ImageDraw.Draw(plate), ImageFont.load_default(size)
    start = width / 2 - pitch * (len(text) - 1) / 2
    for i, character in enumerate(text):
        pen.text((round(start + i * pitch), middle), character, font=font, fill=255, anchor="mm")
    thin = np.asarray(plate, np.float32) / 255
    # Thin strokes vanish in 14-pixel patches: a second, paler impression makes them about a pixel wider.
    bold = np.maximum(thin, _TEXT_WEIGHT * np.roll(thin, 1, axis=1)).astype(np.float32)
    return bold, -(width // 2), -middle
