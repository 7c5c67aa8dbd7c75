"""GQA: questions composed from scene graphs, answered by a word."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from mmfast.eval.datasets.files import Row, named_rows
from mmfast.eval.datasets.local import SHORT_ANSWER, LocalTask
from mmfast.eval.metrics.text import normalise_gqa
from mmfast.eval.metrics.vqa import gqa
from mmfast.eval.task import Media, Sample, Scored


@dataclass(frozen=True)
class Gqa(LocalTask):
    """GQA (Hudson & Manning, 2019): 12,578 questions of the balanced test-dev split.

    Accuracy is exact match; questions of structure "query" are open, all others binary, as in the official tool.

    Args:
        root: the folder.
        split: ``"testdev"`` or ``"val"``, always the balanced half.
        limit: ask only so many questions, the first ones; None for all.
        punctuation: ignore punctuation, as lmms-eval does and LLaVA's tables do not.
    """

    name: ClassVar[str] = "gqa"
    media: ClassVar[Media] = "image"
    paper: ClassVar[str] = "arXiv:1902.09506"
    splits: ClassVar[tuple[str, ...]] = ("testdev", "val")
    source: ClassVar[str] = "questions 1.2 and images of GQA (Stanford, visualreasoning)"
    layout: ClassVar[tuple[str, ...]] = ("{split}_balanced_questions.json", "images/<imageId>.jpg")
    export: ClassVar[str] = "lmms-lab/GQA"

    split: str = "testdev"
    punctuation: bool = False

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""
        path = self.find(self.layout[0].format(split=self.split))
        if path is not None:
            for name, row in named_rows(path):
                image = row.text("imageId")
                yield self._sample(name, row, row.file(self.folder(), f"images/{image}.jpg", f"{image}.jpg"))
            return
        config = f"{self.split}_balanced"
        # Kept as they are written: decoded, all of them would fill the memory.
        pictures = {row.text("id"): row for row in self.exported(config=f"{config}_images")}
        for row in self.exported(config=f"{config}_instructions"):
            if row.text("imageId") not in pictures:
                raise row.error(f"imageId is {row.text('imageId')!r}; there is no such image in {config}_images")
            picture = pictures[row.text("imageId")].image("image", self.folder())
            yield self._sample(row.text("id"), row, picture)

    def _sample(self, name: str, row: Row, picture: Image.Image | Path) -> Sample:
        types = row.get("types")
        if not isinstance(types, dict):
            raise row.error("types must be an object with structural")
        return Sample(
            sample_id=name,
            question=row.text("question") + SHORT_ANSWER,
            answers=(row.text("answer"),),
            images=(picture,),
            category="open" if types.get("structural") == "query" else "binary",
            cluster=row.text("imageId"),
        )

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Score 1.0 for the expected answer."""
        right = gqa(prediction, sample.answers[0], punctuation=self.punctuation)
        return Scored(right, normalise_gqa(prediction))
