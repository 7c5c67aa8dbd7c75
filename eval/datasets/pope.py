"""POPE: is there a snowboard in the image? Objects that are not there, sampled at random or to mislead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from mmfast.eval.datasets.files import Row, jsonl_rows
from mmfast.eval.datasets.local import SHORT_ANSWER, LocalTask, one_of
from mmfast.eval.metrics.yes_no import YesNoFigures, pope_label, yes_no_figures
from mmfast.eval.task import Media, Outcome, Sample, Scored

_KINDS = ("random", "popular", "adversarial")
_READINGS = ("llava", "lmms_eval")


@dataclass(frozen=True)
class Pope(LocalTask):
    """POPE (Li et al., 2023): 3,000 questions in each of three kinds, half of them to be denied.

    The headline is the mean F1 of the kinds, "yes" being the positive class.

    Args:
        root: the folder.
        split: ``"random"``, ``"popular"``, ``"adversarial"`` or ``"all"`` of them.
        limit: ask only so many questions, the first ones; None for all.
        reading: ``"llava"`` takes every answer without a denial for a yes; ``"lmms_eval"`` takes only the bare
            words for answers.
    """

    name: ClassVar[str] = "pope"
    media: ClassVar[Media] = "image"
    metric: ClassVar[str] = "f1"
    chance: ClassVar[float] = 50.0
    paper: ClassVar[str] = "arXiv:2305.10355"
    splits: ClassVar[tuple[str, ...]] = ("all", *_KINDS)
    source: ClassVar[str] = "output/coco of the POPE repository (AoiDragon/POPE) and the COCO images val2014"
    layout: ClassVar[tuple[str, ...]] = ("coco_pope_<kind>.json", "val2014/COCO_val2014_<12 digits>.jpg")
    export: ClassVar[str] = "lmms-lab/POPE"

    split: str = "all"
    reading: str = "llava"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option, its value and what is legal.
        """
        super().__post_init__()
        one_of("reading", self.reading, _READINGS)

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the kinds."""
        kinds = _KINDS if self.split == "all" else (self.split,)
        paths = [self.find(f"coco_pope_{kind}.json", f"coco/coco_pope_{kind}.json") for kind in kinds]
        if not any(paths):
            yield from (sample for sample in map(self._exported, self.exported("test")) if sample.category in kinds)
            return
        for kind, path in zip(kinds, paths, strict=True):
            if path is None:
                raise self.missing()
            for row in jsonl_rows(path):
                image = row.text("image")
                picture = row.file(self.folder(), f"val2014/{image}", image)
                yield self._sample(row, kind, picture, row.text("text"), row.choice("label", ("yes", "no")), image)

    def _exported(self, row: Row) -> Sample:
        picture, kind = row.image("image", self.folder()), row.choice("category", _KINDS)
        answer = row.choice("answer", ("yes", "no"))
        return self._sample(row, kind, picture, row.text("question"), answer, row.text("image_source", ""))

    def _sample(
        self, row: Row, kind: str, picture: Image.Image | Path, question: str, answer: str, cluster: str
    ) -> Sample:
        return Sample(
            sample_id=f"{kind}/{row.text('question_id')}",
            question=question.strip() + SHORT_ANSWER,
            answers=(answer,),
            images=(picture,),
            category=kind,
            cluster=cluster,
        )

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Score 1.0 for the right label; an empty prediction is wrong, though published tools read it as yes."""
        label = pope_label(prediction) if self.reading == "llava" else prediction.lower().strip()
        label = label if prediction.strip() else ""
        return Scored(float(label == sample.answers[0]), label)

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Report F1, accuracy, precision, recall and the share of yes, averaged over the kinds, then of each."""
        if not outcomes:
            return {}
        kinds = [kind for kind in _KINDS if any(outcome.sample.category == kind for outcome in outcomes)]
        found = {kind: _figures([one for one in outcomes if one.sample.category == kind]) for kind in kinds}
        names = ("f1", "accuracy", "precision", "recall", "yes_ratio")
        means = {name: 100 * sum(getattr(found[kind], name) for kind in kinds) / len(kinds) for name in names}
        return means | {f"{name}/{kind}": 100 * getattr(found[kind], name) for name in names for kind in kinds}


def _figures(outcomes: Sequence[Outcome]) -> YesNoFigures:
    labels = [outcome.scored.parsed for outcome in outcomes]
    return yes_no_figures(labels, [outcome.sample.answers[0] for outcome in outcomes])
