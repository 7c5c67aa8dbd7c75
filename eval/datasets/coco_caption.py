"""COCO captions: describe a photograph in a sentence, scored by CIDEr-D."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from PIL import Image

from mmfast.eval.datasets.files import Row, json_rows
from mmfast.eval.datasets.local import LocalTask
from mmfast.eval.metrics.caption import CiderD, cider_d, ptb_lite
from mmfast.eval.task import Media, Outcome, Sample, Scored

_KARPATHY = ("dataset_coco.json", "caption_datasets/dataset_coco.json")
_OFFICIAL = ("captions_val2014.json", "annotations/captions_val2014.json")
_PROMPT = "Provide a one-sentence caption for the provided image."


@dataclass(frozen=True)
class CocoCaption(LocalTask):
    """COCO captions (Chen et al., 2015): 5,000 images of the Karpathy split, five captions each.

    The headline is CIDEr-D in the scale of tables (about 110 for good models), with the ``ptb_lite`` tokeniser.
    It counts how rare words are within the images asked about, so values of a part of the split are not
    comparable with those of the whole. Captions are not shortened: a model that writes more than a sentence
    scores badly.

    Args:
        root: the folder.
        split: ``"test"`` or ``"val"`` of Karpathy, or ``"val2014"`` for the whole official split.
        limit: ask only about so many images, the first ones; None for all.
    """

    name: ClassVar[str] = "coco-caption"
    media: ClassVar[Media] = "image"
    metric: ClassVar[str] = "cider"
    max_new_tokens: ClassVar[int] = 64
    paper: ClassVar[str] = "arXiv:1504.00325"
    splits: ClassVar[tuple[str, ...]] = ("test", "val", "val2014")
    source: ClassVar[str] = (
        "dataset_coco.json of Karpathy's splits, or captions_val2014.json, and the COCO images of 2014"
    )
    layout: ClassVar[tuple[str, ...]] = (
        "dataset_coco.json (for val2014: captions_val2014.json)",
        "val2014/COCO_val2014_<12 digits>.jpg",
    )
    export: ClassVar[str] = "lmms-lab/COCO-Caption (for val2014 alone)"

    split: str = "test"

    def read(self) -> Iterator[Sample]:
        """Yield all images of the split."""
        official = self.split == "val2014"
        path = self.find(*(_OFFICIAL if official else _KARPATHY))
        if path is None and not official:
            raise self.missing()
        if path is None:
            for row in self.exported("val"):
                yield _sample(row.text("question_id"), row.image("image", self.folder()), row.texts("answer"), row)
        elif official:
            yield from self._official(path)
        else:
            yield from self._karpathy(path)

    def _karpathy(self, path: Path) -> Iterator[Sample]:
        for row in json_rows(path, "images"):
            if row.text("split") != self.split:
                continue
            name = row.text("filename")
            picture = row.file(self.folder(), f"{row.text('filepath', 'val2014')}/{name}", name)
            captions = tuple(sentence.text("raw") for sentence in row.records("sentences"))
            yield _sample(row.text("cocoid"), picture, captions, row)

    def _official(self, path: Path) -> Iterator[Sample]:
        captions: dict[str, list[str]] = {}
        for row in json_rows(path, "annotations"):
            captions.setdefault(row.text("image_id"), []).append(row.text("caption"))
        for row in json_rows(path, "images"):
            name, known = row.text("file_name"), captions.get(row.text("id"), [])
            yield _sample(row.text("id"), row.file(self.folder(), f"val2014/{name}", name), tuple(known), row)

    @cached_property
    def _scorer(self) -> CiderD:
        return CiderD.of([_tokens(sample) for sample in self.samples()])

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Score one caption, 0.0 to 10.0, words being as rare as they are in all images of the task."""
        caption = ptb_lite(prediction)
        return Scored(self._scorer.score(caption, _tokens(sample)) if caption else 0.0, caption)

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Score the captions among each other, in the scale of tables."""
        if not outcomes:
            return {}
        captions = [ptb_lite(outcome.prediction) for outcome in outcomes]
        corpus, _ = cider_d(captions, [_tokens(outcome.sample) for outcome in outcomes])
        return {"cider": 100 * corpus}


def _sample(name: str, picture: Image.Image | Path, captions: tuple[str, ...], row: Row) -> Sample:
    if not captions:
        raise row.error("there are no captions of this image; there must be at least one")
    return Sample(sample_id=name, question=_PROMPT, answers=captions, images=(picture,))


def _tokens(sample: Sample) -> list[str]:
    return [ptb_lite(caption) for caption in sample.answers]
