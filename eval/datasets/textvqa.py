"""TextVQA: questions that ask for reading what stands in the picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from mmfast.eval.datasets.files import Row, json_rows
from mmfast.eval.datasets.local import SHORT_ANSWER, LocalTask
from mmfast.eval.metrics.text import normalise_evalai
from mmfast.eval.metrics.vqa import textvqa_evalai
from mmfast.eval.task import Media, Sample, Scored


@dataclass(frozen=True)
class TextVqa(LocalTask):
    """TextVQA (Singh et al., 2019): 5,000 validation questions with ten answers each.

    Args:
        root: the folder.
        split: ``"val"`` or ``"train"``.
        limit: ask only so many questions, the first ones; None for all.
        ocr_tokens: put the words that an OCR system found into the prompt, as LLaVA's tables do. Only the
            export has them.
    """

    name: ClassVar[str] = "textvqa"
    media: ClassVar[Media] = "image"
    paper: ClassVar[str] = "arXiv:1904.08920"
    splits: ClassVar[tuple[str, ...]] = ("val", "train")
    source: ClassVar[str] = "the questions 0.5.1 of TextVQA (textvqa.org) and its train_val_images.zip"
    layout: ClassVar[tuple[str, ...]] = ("TextVQA_0.5.1_{split}.json", "train_images/<image_id>.jpg")
    export: ClassVar[str] = "lmms-lab/textvqa"

    split: str = "val"
    ocr_tokens: bool = False

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""
        path = self.find(self.layout[0].format(split=self.split))
        if path is None:
            part = "validation" if self.split == "val" else self.split
            yield from (self._sample(row, row.image("image", self.folder())) for row in self.exported(part))
            return
        for row in json_rows(path, "data"):
            image = row.text("image_id")
            yield self._sample(row, row.file(self.folder(), f"train_images/{image}.jpg", f"{image}.jpg"))

    def _sample(self, row: Row, picture: Image.Image | Path) -> Sample:
        hint = f"\nReference OCR token: {', '.join(row.texts('ocr_tokens'))}" if self.ocr_tokens else ""
        return Sample(
            sample_id=row.text("question_id"),
            question=row.text("question") + hint + SHORT_ANSWER,
            answers=row.texts("answers"),
            images=(picture,),
            cluster=row.text("image_id"),
        )

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Score by agreement with ten people; 0.0 to 1.0."""
        return Scored(textvqa_evalai(prediction, sample.answers), normalise_evalai(prediction))
