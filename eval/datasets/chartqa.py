"""ChartQA: questions about charts, by people and made from captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from mmfast.eval.datasets.files import Row, json_rows
from mmfast.eval.datasets.local import LocalTask
from mmfast.eval.metrics.numbers import relaxed_accuracy
from mmfast.eval.task import Media, Sample, Scored

_KINDS = ("human", "augmented")
_TAIL = "\nAnswer the question with a single word."


@dataclass(frozen=True)
class ChartQa(LocalTask):
    """ChartQA (Masry et al., 2022): 2,500 test questions, half by people (human), half generated (augmented).

    Args:
        root: the folder.
        split: ``"test"``, ``"val"`` or ``"train"``.
        limit: ask only so many questions, the first ones; None for all.
    """

    name: ClassVar[str] = "chartqa"
    media: ClassVar[Media] = "image"
    metric: ClassVar[str] = "relaxed_accuracy"
    paper: ClassVar[str] = "arXiv:2203.10244"
    splits: ClassVar[tuple[str, ...]] = ("test", "val", "train")
    source: ClassVar[str] = "the ChartQA Dataset folder (vis-nlp/ChartQA)"
    layout: ClassVar[tuple[str, ...]] = (
        "{split}/{split}_human.json",
        "{split}/{split}_augmented.json",
        "{split}/png/<imgname>",
    )
    export: ClassVar[str] = "lmms-lab/ChartQA"

    split: str = "test"

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""
        top = self.find(f"ChartQA Dataset/{self.split}", self.split)
        paths = [top / f"{self.split}_{kind}.json" for kind in _KINDS] if top else []
        if not any(path.is_file() for path in paths):
            yield from self._exported()
            return
        for kind, path in zip(_KINDS, paths, strict=True):
            if not path.is_file():
                raise self.missing()
            for number, row in enumerate(json_rows(path), start=1):
                name = row.text("imgname")
                picture = row.file(path.parent, f"png/{name}")
                yield self._sample(row, f"{kind}/{number}", kind, picture, ("query", "label"), name)

    def _exported(self) -> Iterator[Sample]:
        for number, row in enumerate(self.exported(), start=1):
            kind = row.choice("type", tuple(f"{kind}_{self.split}" for kind in _KINDS)).split("_")[0]
            picture = row.image("image", self.folder())
            yield self._sample(row, f"{kind}/{number}", kind, picture, ("question", "answer"), "")

    def _sample(
        self, row: Row, name: str, kind: str, picture: Image.Image | Path, fields: tuple[str, str], cluster: str
    ) -> Sample:
        return Sample(
            sample_id=name,
            question=row.text(fields[0]) + _TAIL,
            answers=(row.text(fields[1]),),
            images=(picture,),
            category=kind,
            cluster=cluster,
        )

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Score 1.0 within 5 % of a number, or for the same text."""
        text = prediction.strip()
        return Scored(relaxed_accuracy(text, sample.answers[0]) if text else 0.0, text)
