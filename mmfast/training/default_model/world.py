"""What the stages look at: rendered scenes and clips with a label for each patch, drawn anew from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmfast.eval.datasets.shapes.questions import CORE_FAMILIES, EXTRA_FAMILIES, Question, ask
from mmfast.eval.datasets.shapes.render import render
from mmfast.eval.datasets.shapes.scene import (
    CHARACTERS,
    COLORS,
    GRID,
    PATCH,
    SHAPES,
    WORLD_VERSION,
    Scene,
    character_pitch,
    sample_scene,
)
from mmfast.eval.datasets.shapes.video import CLIP_FAMILIES, MOTION_FAMILIES, render_clip

PATCHES = GRID * GRID

LABELS: dict[str, int] = {
    "color": len(COLORS) + 1,
    "shape": len(SHAPES) + 2,
    "character": len(CHARACTERS) + 1,
    "size": 3,
    "centre": 2,
    "row": GRID + 1,
    "column": GRID + 1,
}
"""What is known of a patch, and how many values it takes; 0 is "nothing here", which no row or column is."""

_TRAIN = 0
_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
_SPREAD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
_COLOR = {name: i + 1 for i, name in enumerate(COLORS)}
_SHAPE = {name: i + 1 for i, name in enumerate((*SHAPES, "text"))}
_CHARACTER = {name: i + 1 for i, name in enumerate(CHARACTERS)}


@dataclass(frozen=True)
class Episode:
    """One picture or clip with its questions.

    Attributes:
        scenes: what each frame shows.
        owners: int16 ``[T, 256]``, the object in each patch, -1 for background.
        labels: name of :data:`LABELS` -> int64 ``[T, 256]``.
        pixels: float32 ``[T, 3, 224, 224]`` as the vision tower takes them; None where nobody asked.
        questions: what is asked.
    """

    scenes: tuple[Scene, ...]
    owners: NDArray[np.int16]
    labels: dict[str, Tensor]
    pixels: Tensor | None
    questions: tuple[Question, ...]


def generator(*words: int) -> np.random.Generator:
    """Return a source of chance for training data; no data set of :class:`Shapes` shares its state.

    Example:
        >>> float(generator(1, 2).random()) == float(generator(1, 2).random())
        True
    """
    return np.random.default_rng([WORLD_VERSION, _TRAIN, 0, 2, 7, *words])


def picture(
    rng: np.random.Generator,
    *,
    crowded: bool = False,
    most: int | None = None,
    extras: float = 0.0,
    pixels: bool = True,
) -> Episode:
    """Draw a picture.

    Args:
        rng: the source of chance.
        crowded: many objects and text tags.
        most: at most so many shapes.
        extras: chance of asking each of the families beyond the core ones.
        pixels: whether anyone will look at it.
    """
    shapes = int(rng.integers(4, 17)) if crowded else None if most is None else int(rng.integers(1, most + 1))
    scene = sample_scene(rng, num_shapes=shapes, num_texts=int(rng.integers(1, 9)) if crowded else None)
    rendered = render(scene)
    families = [*CORE_FAMILIES, *(family for family in EXTRA_FAMILIES if rng.random() < extras)]
    # Twice: the wordings and the objects asked about differ.
    questions = (*ask(scene, rng, families), *ask(scene, rng, CORE_FAMILIES))
    owners = rendered.owners.reshape(1, PATCHES)
    return Episode(
        (scene,),
        owners,
        _labels([scene], owners),
        _pixels([rendered.image]) if pixels else None,
        _distinct(questions),
    )


def clip(rng: np.random.Generator, frames: int, *, pixels: bool = True) -> Episode:
    """Draw a clip of so many frames."""
    families = (*CLIP_FAMILIES, *MOTION_FAMILIES)
    drawn = render_clip([int(v) for v in rng.integers(2**31, size=4)], frames, families=families)
    owners = drawn.owners.reshape(frames, PATCHES)
    more = ask(drawn.scenes[0], rng, CLIP_FAMILIES)
    return Episode(
        drawn.scenes,
        owners,
        _labels(drawn.scenes, owners),
        _pixels(drawn.frames) if pixels else None,
        _distinct((*drawn.questions, *more)),
    )


def _distinct(questions: Sequence[Question]) -> tuple[Question, ...]:
    return tuple({question.text: question for question in questions}.values())


def _pixels(images: Sequence[object]) -> Tensor:
    array = np.stack([np.asarray(image, np.float32) for image in images])
    normal = ((array / 255 - _MEAN) / _SPREAD).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(normal.transpose(0, 3, 1, 2)))


def _labels(scenes: Sequence[Scene], owners: NDArray[np.int16]) -> dict[str, Tensor]:
    found = {name: np.zeros((len(scenes), PATCHES), np.int64) for name in LABELS}
    found["row"][:], found["column"][:] = 1 + np.arange(PATCHES) // GRID, 1 + np.arange(PATCHES) % GRID
    for frame, scene in enumerate(scenes):
        for item in scene.items:
            mine = np.flatnonzero(owners[frame] == item.ident)
            found["color"][frame, mine] = _COLOR[item.color]
            found["shape"][frame, mine] = _SHAPE[item.kind]
            if not item.is_text:
                found["size"][frame, mine] = 1 + (item.size == "large")
                found["centre"][frame, item.y // PATCH * GRID + item.x // PATCH] = 1
                continue
            pitch = character_pitch(item.radius)
            centres = [round(item.x + (i - (len(item.text) - 1) / 2) * pitch) for i in range(len(item.text))]
            for place in mine:
                middle = (place % GRID + 0.5) * PATCH
                nearest = min(range(len(centres)), key=lambda i: abs(centres[i] - middle))
                found["character"][frame, place] = _CHARACTER[item.text[nearest]]
            for character, x in zip(item.text, centres, strict=True):
                middle_place = item.y // PATCH * GRID + x // PATCH
                found["character"][frame, middle_place] = _CHARACTER[character]
                found["centre"][frame, middle_place] = 1
    return {name: torch.from_numpy(values) for name, values in found.items()}
