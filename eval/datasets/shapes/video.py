"""Short clips of moving shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmfast.eval.datasets.shapes.questions import Question, ask, check_families, references
from mmfast.eval.datasets.shapes.render import Owners, draw_background, render
from mmfast.eval.datasets.shapes.scene import CANVAS, Item, Scene, moved, overlaps, sample_items

CLIP_FAMILIES: tuple[str, ...] = ("exist", "color", "shape", "size")
"""Families whose answer is the same in every frame."""

MOTION_FAMILIES: tuple[str, ...] = ("direction",)
"""Families that need more than one frame."""

_CHECKED_TIMES = np.linspace(0.0, 1.0, 33)
_ATTEMPTS = 80


@dataclass(frozen=True)
class Clip:
    """A rendered clip.

    Attributes:
        frames: RGB pictures.
        owners: int16 ``[T, 16, 16]``, the ``ident`` of the object in each patch, -1 for background.
        scenes: what each frame shows.
        questions: questions whose answers hold in every frame, then those about motion.
    """

    frames: tuple[Image.Image, ...]
    owners: Owners
    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class _Track:
    """An object that flies straight and bounces off the walls during one unit of time."""

    item: Item
    velocity: tuple[float, float]

    def at(self, time: float) -> Item:
        width, height = self.item.half_extent
        x = _bounce(self.item.x + self.velocity[0] * time, width + 1, CANVAS - width - 1)
        y = _bounce(self.item.y + self.velocity[1] * time, height + 1, CANVAS - height - 1)
        return moved(self.item, round(x), round(y))

    @property
    def bounces(self) -> bool:
        end, start = self.at(1.0), self.item
        flown = (end.x - start.x - self.velocity[0], end.y - start.y - self.velocity[1])
        return max(map(abs, flown)) > 1


def render_clip(
    seed: int | Sequence[int],
    num_frames: int = 8,
    size: int = CANVAS,
    *,
    families: Sequence[str] = CLIP_FAMILIES + MOTION_FAMILIES,
) -> Clip:
    """Render a clip of 2-5 shapes that move in straight lines and bounce off the walls.

    The motion belongs to the seed: more frames show the same clip more finely.

    Args:
        seed: which clip.
        num_frames: how many frames, at least 1.
        size: edge of the square frames in pixels.
        families: which questions to make, out of :data:`CLIP_FAMILIES` and :data:`MOTION_FAMILIES`.

    Returns:
        The clip.

    Raises:
        ValueError: if ``num_frames`` or ``size`` is too small, or a family is unknown.

    Example:
        >>> clip = render_clip(0, num_frames=3)
        >>> len(clip.frames), clip.owners.shape
        (3, (3, 16, 16))
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}.")
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}.")
    check_families(families, CLIP_FAMILIES + MOTION_FAMILIES)
    rng = np.random.default_rng(seed)
    backdrop = int(rng.integers(2**31))
    tracks = _sample_tracks(rng)
    times = np.linspace(0.0, 1.0, num_frames)
    scenes = tuple(Scene(tuple(track.at(time) for track in tracks), backdrop) for time in times)
    background = draw_background(backdrop)
    rendered = [render(scene, background) for scene in scenes]
    frames = tuple(picture.image for picture in rendered)
    if size != CANVAS:
        frames = tuple(frame.resize((size, size), Image.Resampling.BICUBIC) for frame in frames)
    questions = [
        question
        for family in families
        for question in (
            _ask_motion(scenes[0], tracks, rng) if family == "direction" else ask(scenes[0], rng, [family])
        )
    ]
    return Clip(frames, np.stack([picture.owners for picture in rendered]), scenes, tuple(questions))


def _sample_tracks(rng: np.random.Generator) -> list[_Track]:
    """Draw objects one by one, each with a path that meets no earlier one."""
    tracks: list[_Track] = []
    for item in sample_items(rng, int(rng.integers(2, 6)), num_texts=0):
        width, height = item.half_extent
        for _ in range(_ATTEMPTS):
            x = int(rng.integers(width + 1, CANVAS - width))
            y = int(rng.integers(height + 1, CANVAS - height))
            speed, angle = rng.uniform(40, 140), rng.uniform(0, 2 * np.pi)
            track = _Track(moved(item, x, y), (speed * float(np.cos(angle)), speed * float(np.sin(angle))))
            if all(not overlaps(track.at(t), other.at(t), gap=4) for other in tracks for t in _CHECKED_TIMES):
                tracks.append(track)
                break
    return tracks


def _ask_motion(scene: Scene, tracks: Sequence[_Track], rng: np.random.Generator) -> list[Question]:
    options = []
    for item, phrase in references(scene):
        track = next(t for t in tracks if t.item.ident == item.ident)
        across, down = track.velocity
        # Only paths without a bounce and clearly along one axis have one direction.
        if not track.bounces and max(abs(across), abs(down)) >= 2 * min(abs(across), abs(down)):
            words = ("right" if across > 0 else "left", "down" if down > 0 else "up")
            options.append((item, phrase, words[abs(down) > abs(across)]))
    if not options:
        return []
    item, phrase, word = options[int(rng.integers(len(options)))]
    return [Question("direction", f"in which direction does the {phrase} move?", word, (item.ident,))]


def _bounce(value: float, low: float, high: float) -> float:
    """Reflect a straight path back and forth between two walls."""
    width = high - low
    phase = (value - low) % (2 * width)
    return low + min(phase, 2 * width - phase)
