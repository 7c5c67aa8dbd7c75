"""Records: pictures or clips with one question each, in balanced numbers per family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmfast.eval.datasets.shapes.questions import CORE_FAMILIES, FAMILIES, Question, ask, check_families
from mmfast.eval.datasets.shapes.render import Owners, render
from mmfast.eval.datasets.shapes.scene import WORLD_VERSION, Scene, sample_scene
from mmfast.eval.datasets.shapes.video import CLIP_FAMILIES, MOTION_FAMILIES, render_clip

SPLITS: tuple[str, ...] = ("train", "heldout", "test")

_PATIENCE = 200


@dataclass(frozen=True)
class Record:
    """One question about one picture or clip.

    Attributes:
        question_id: unique, and the same on every machine: split, seed, scene and family.
        family: kind of the question.
        question: its text.
        answer: the expected answer.
        object_ids: the objects the answer depends on, as named in ``owners``.
        frames: one picture, or the frames of a clip.
        owners: int16 ``[T, 16, 16]``, the object in each patch, -1 for background.
        scene: what the (first) picture shows.
    """

    question_id: str
    family: str
    question: str
    answer: str
    object_ids: tuple[int, ...]
    frames: tuple[Image.Image, ...]
    owners: Owners
    scene: Scene

    @property
    def image(self) -> Image.Image:
        """The picture, or the first frame of a clip."""
        return self.frames[0]


@dataclass(frozen=True)
class Shapes:
    """A data set of rendered scenes, drawn anew, and equally, each time it is read.

    Args:
        split: ``"train"``, ``"heldout"`` or ``"test"``; they share no scene.
        seed: which data set.
        families: the question families, each given the same number of questions (one more for the first
            ones where the number does not divide). None takes what the embedded model answers best:
            :data:`CORE_FAMILIES` for pictures, :data:`CLIP_FAMILIES` for clips.
        num_questions: how many records.
        num_frames: 1 for pictures, more for clips.

    Raises:
        ValueError: for an unknown split or family, a negative seed, or fewer questions than 1.

    Example:
        >>> record = next(iter(Shapes(families=["color"], num_questions=1)))
        >>> record.family, record.image.size, record.owners.shape
        ('color', (224, 224), (1, 16, 16))
    """

    split: str = "heldout"
    seed: int = 0
    families: Sequence[str] | None = None
    num_questions: int = 600
    num_frames: int = 1

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {self.split!r}.")
        for name, least in (("seed", 0), ("num_questions", 1), ("num_frames", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        known = FAMILIES if self.num_frames == 1 else CLIP_FAMILIES + MOTION_FAMILIES
        default = CORE_FAMILIES if self.num_frames == 1 else CLIP_FAMILIES
        families = tuple(default if self.families is None else self.families)
        check_families(families, known)
        object.__setattr__(self, "families", families)

    def __len__(self) -> int:
        return self.num_questions

    def __iter__(self) -> Iterator[Record]:
        """Yield the records, scene by scene."""
        families = tuple(self.families or ())
        each, rest = divmod(self.num_questions, len(families))
        wanted = {family: each + (i < rest) for i, family in enumerate(families)}
        index = idle = 0
        while any(wanted.values()):
            open_families = [family for family in families if wanted[family]]
            fresh = list(self._records(index, open_families))
            for record in fresh:
                wanted[record.family] -= 1
                yield record
            index, idle = index + 1, 0 if fresh else idle + 1
            if idle > _PATIENCE:
                raise RuntimeError(f"no scene out of {_PATIENCE} allows a question of {open_families}.")

    def _records(self, index: int, families: Sequence[str]) -> Iterator[Record]:
        key = (WORLD_VERSION, SPLITS.index(self.split), self.seed, self.num_frames > 1, index)
        if self.num_frames > 1:
            clip = render_clip([int(part) for part in key], self.num_frames)
            questions = [question for question in clip.questions if question.family in families]
            frames, owners, scene = clip.frames, clip.owners, clip.scenes[0]
        else:
            rng = np.random.default_rng([int(part) for part in key])
            scene = sample_scene(rng)
            # Asked for all families, then picked: which others are still open must not change a question.
            questions = [question for question in ask(scene, rng, FAMILIES) if question.family in families]
            if not questions:
                return
            picture = render(scene)
            frames, owners = (picture.image,), picture.owners[None]
        for question in questions:
            yield self._record(index, question, frames, owners, scene)

    def _record(
        self, index: int, question: Question, frames: tuple[Image.Image, ...], owners: Owners, scene: Scene
    ) -> Record:
        kind = "scene" if self.num_frames == 1 else "clip"
        name = f"shapes{WORLD_VERSION}/{self.split}/{self.seed}/{kind}{index}/{question.family}"
        return Record(
            question_id=name,
            family=question.family,
            question=question.text,
            answer=question.answer,
            object_ids=question.object_ids,
            frames=frames,
            owners=owners,
            scene=scene,
        )
