"""The rendered world as tasks: questions about pictures and about clips, without a download."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from mmfast.eval.datasets.shapes.dataset import Record, Shapes
from mmfast.eval.datasets.shapes.questions import score
from mmfast.eval.datasets.shapes.scene import WORLD_VERSION
from mmfast.eval.task import Media, Sample, Scored, Task


@dataclass(frozen=True)
class _ShapesTask(Task):
    """What pictures and clips share: one right answer, and questions of one scene form a cluster."""

    max_new_tokens: ClassVar[int] = 10
    version: ClassVar[int] = WORLD_VERSION

    split: str = "heldout"
    seed: int = 0
    families: tuple[str, ...] | None = None
    num_questions: int = 600

    def __post_init__(self) -> None:
        self._records()

    def __len__(self) -> int:
        return self.num_questions

    def samples(self) -> Iterator[Sample]:
        """Render the questions one by one."""
        for record in self._records():
            yield Sample(
                sample_id=record.question_id,
                question=record.question,
                answers=(record.answer,),
                category=record.family,
                cluster=record.question_id.rpartition("/")[0],
                **self._shown(record),
            )

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Compare with the one right answer, letter case and a full stop at the end aside."""
        parsed = " ".join(prediction.casefold().split()).removesuffix(".").rstrip()
        return Scored(float(score(prediction, sample.answers[0])), parsed)

    def _records(self) -> Shapes:
        return Shapes(self.split, self.seed, self.families, self.num_questions)

    def _shown(self, record: Record) -> dict[str, Any]:
        return {"images": record.frames}


@dataclass(frozen=True)
class ShapesImage(_ShapesTask):
    """Questions about one rendered picture each, in equal numbers per family.

    Args:
        split: ``"heldout"`` or ``"test"``, which the embedded model has never seen, or ``"train"``.
        seed: which data set.
        families: question families; None takes those that the embedded model knows.
        num_questions: how many questions.

    Raises:
        ValueError: for an unknown split or family, or a number out of range.

    Example:
        >>> sample = next(ShapesImage(num_questions=1).samples())
        >>> sample.sample_id, sample.question, sample.answers
        ('shapes1/heldout/0/scene0/exist', 'can you see an orange ring?', ('no',))
    """

    name: ClassVar[str] = "shapes-image"
    media: ClassVar[Media] = "image"


@dataclass(frozen=True)
class ShapesVideo(_ShapesTask):
    """Questions about rendered clips of moving shapes, in equal numbers per family.

    Args:
        split: as for pictures.
        seed: which data set.
        families: question families of clips; None takes exist, color, shape and size.
        num_questions: how many questions.
        num_frames: frames of each clip, at least 2; the embedded model has learned from clips of two to six.

    Raises:
        ValueError: for an unknown split or family, or a number out of range.

    Example:
        >>> sample = next(ShapesVideo(num_questions=1).samples())
        >>> len(sample.frames), sample.category
        (4, 'exist')
    """

    name: ClassVar[str] = "shapes-video"
    media: ClassVar[Media] = "video"

    num_questions: int = 300
    num_frames: int = 4

    def __post_init__(self) -> None:
        if self.num_frames < 2:
            raise ValueError(
                f"num_frames={self.num_frames} must be at least 2; task 'shapes-image' asks about single pictures"
            )
        super().__post_init__()

    def _records(self) -> Shapes:
        return Shapes(self.split, self.seed, self.families, self.num_questions, self.num_frames)

    def _shown(self, record: Record) -> dict[str, Any]:
        return {"frames": record.frames}
