"""DocVQA: questions about scanned pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from mmfast.eval.datasets.files import Row, json_rows
from mmfast.eval.datasets.local import SHORT_ANSWER, LocalTask
from mmfast.eval.metrics.anls import anls_docvqa
from mmfast.eval.task import Media, Sample, Scored


@dataclass(frozen=True)
class DocVqa(LocalTask):
    """DocVQA (Mathew et al., 2021): 5,349 validation questions; answers of the test split are hidden.

    Args:
        root: the folder.
        split: ``"val"`` or ``"train"``.
        limit: ask only so many questions, the first ones; None for all.
    """

    name: ClassVar[str] = "docvqa"
    media: ClassVar[Media] = "image"
    metric: ClassVar[str] = "anls"
    max_new_tokens: ClassVar[int] = 32
    paper: ClassVar[str] = "arXiv:2007.00398"
    splits: ClassVar[tuple[str, ...]] = ("val", "train")
    source: ClassVar[str] = "the annotations and images of DocVQA, task 1 (rrc.cvc.uab.es, challenge 17)"
    layout: ClassVar[tuple[str, ...]] = ("{split}_v1.0.json or {split}_v1.0_withQT.json", "documents/<image>.png")
    export: ClassVar[str] = "lmms-lab/DocVQA"

    split: str = "val"

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""
        path = self.find(
            f"{self.split}_v1.0_withQT.json", f"{self.split}_v1.0.json", f"{self.split}/{self.split}_v1.0.json"
        )
        if path is None:
            part = "validation" if self.split == "val" else self.split
            rows = self.exported(part, config="DocVQA")
            yield from (self._sample(row, row.image("image", self.folder())) for row in rows)
            return
        for row in json_rows(path, "data"):
            image = row.text("image")
            places = (image, f"{self.split}/{image}", f"spdocvqa_images/{Path(image).name}")
            yield self._sample(row, row.file(self.folder(), *places))

    def _sample(self, row: Row, picture: Image.Image | Path) -> Sample:
        answers = row.texts("answers")
        if not answers:
            raise row.error("answers is empty; it must hold at least one")
        kinds = row.values.get("question_types")
        return Sample(
            sample_id=row.text("questionId"),
            question=row.text("question") + SHORT_ANSWER,
            answers=answers,
            images=(picture,),
            category=str(kinds[0]) if isinstance(kinds, list) and kinds else "",
            cluster=row.text("docId", ""),
        )

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Score the normalised edit distance to the nearest answer; 0.0 to 1.0."""
        text = prediction.strip()
        return Scored(anls_docvqa(prediction, sample.answers) if text else 0.0, text)
