"""RefCOCO, RefCOCO+ and RefCOCOg: say where in the picture the thing is that a phrase describes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from mmfast.eval.datasets.files import Row, jsonl_rows
from mmfast.eval.datasets.local import LocalTask, one_of
from mmfast.eval.metrics.boxes import Box, find_box, intersection_over_union
from mmfast.eval.task import Media, Outcome, Sample, Scored

_VARIANTS = {
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
}
_EXPORTS = {"refcoco": "RefCOCO", "refcoco+": "RefCOCOplus", "refcocog": "RefCOCOg"}
_SCALES = ("unit", "padded", "thousand", "pixels")
_THRESHOLD = 0.5
_PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: "


@dataclass(frozen=True)
class RefCoco(LocalTask):
    """RefCOCO and RefCOCO+ (Kazemzadeh et al., 2014; Yu et al., 2016) and RefCOCOg (Mao et al., 2016).

    An answer is right if its first box and the true one share at least half of what they cover.

    Args:
        root: the folder.
        split: ``"val"``, ``"testA"`` (people) or ``"testB"`` (other things); RefCOCOg has ``"val"`` and ``"test"``.
        limit: ask only so many questions, the first ones; None for all.
        variant: ``"refcoco"``, ``"refcoco+"`` or ``"refcocog"``.
        scale: what the model's coordinates mean: ``"unit"`` 0 to 1 of the picture, ``"padded"`` 0 to 1 of the
            picture padded to a square as for LLaVA-1.5, ``"thousand"`` 0 to 1000, ``"pixels"``.
    """

    name: ClassVar[str] = "refcoco"
    media: ClassVar[Media] = "image"
    max_new_tokens: ClassVar[int] = 64
    paper: ClassVar[str] = "arXiv:1608.00272"
    splits: ClassVar[tuple[str, ...]] = ("val", "testA", "testB", "test")
    source: ClassVar[str] = (
        "the JSONL files (image, sent, bbox, height, width) that Qwen-VL and InternVL are evaluated on, and the COCO "
        "images train2014"
    )
    layout: ClassVar[tuple[str, ...]] = ("refcoco_{split}.jsonl (or refcoco+_, refcocog_)", "train2014/<image>")
    export: ClassVar[str] = "lmms-lab/RefCOCO (RefCOCOplus, RefCOCOg)"

    split: str = "val"
    variant: str = "refcoco"
    scale: str = "unit"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option, its value and what is legal.
        """
        super().__post_init__()
        one_of("variant", self.variant, tuple(_VARIANTS))
        one_of("split", self.split, _VARIANTS[self.variant])
        one_of("scale", self.scale, _SCALES)

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""
        path = self.find(f"{self.variant}_{self.split}.jsonl", f"{self.variant}/{self.variant}_{self.split}.jsonl")
        if path is None:
            yield from self._exported()
            return
        for number, row in enumerate(jsonl_rows(path), start=1):
            name = row.text("image")
            picture = row.file(self.folder(), f"train2014/{name.rpartition('/')[2]}", name)
            size = row.integer("width", 1, 10**5), row.integer("height", 1, 10**5)
            box = Box(*row.numbers("bbox", 4))
            yield self._sample(row, str(number), row.text("sent"), picture, size, box)

    def _exported(self) -> Iterator[Sample]:
        for row in self.exported(config=_EXPORTS[self.variant]):
            picture = row.image("image", self.folder())
            if isinstance(picture, Path):
                with Image.open(picture) as opened:
                    size = opened.size
            else:
                size = picture.size
            left, top, width, height = row.numbers("bbox", 4)
            box = Box(left, top, left + width, top + height)
            for number, phrase in enumerate(row.texts("answer"), start=1):
                yield self._sample(row, f"{row.text('question_id')}/{number}", phrase, picture, size, box)

    def _sample(
        self, row: Row, name: str, phrase: str, picture: Image.Image | Path, size: tuple[int, int], box: Box
    ) -> Sample:
        if box.left >= box.right or box.top >= box.bottom:
            raise row.error(f"bbox is {list(box)}; it must have an area")
        return Sample(
            sample_id=f"{self.variant}/{self.split}/{name}",
            question=_PROMPT + phrase,
            answers=(str(list(box)),),
            images=(picture,),
            details={"width": size[0], "height": size[1], "box": tuple(box)},
        )

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Score 1.0 if the first box in the answer overlaps enough; the overlap is in the details."""
        found = find_box(prediction)
        if found is None:
            return Scored(0.0, "", {"iou": 0.0})
        width, height, box = (sample.details[name] for name in ("width", "height", "box"))
        if not isinstance(width, int) or not isinstance(height, int) or not isinstance(box, tuple):
            raise ValueError(f"sample {sample.sample_id}: details must hold width, height and box")
        placed = in_pixels(found, self.scale, width, height)
        overlap = intersection_over_union(placed, Box(*box))
        return Scored(float(overlap >= _THRESHOLD), str(list(found)), {"iou": overlap})

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Add the mean overlap, and how many answers held no box."""
        figures = super().summary(outcomes)
        if not outcomes:
            return figures
        overlaps = [float(outcome.scored.details.get("iou", 0.0)) for outcome in outcomes]
        unread = sum(outcome.scored.parsed == "" for outcome in outcomes)
        return figures | {"iou": 100 * sum(overlaps) / len(overlaps), "n_unparsed": float(unread)}


def in_pixels(box: Box, scale: str, width: int, height: int) -> Box:
    """Bring a box to pixels of the picture.

    Example:
        >>> in_pixels(Box(0.0, 0.25, 0.5, 0.75), "padded", 200, 100)
        Box(left=0.0, top=0.0, right=100.0, bottom=100.0)
        >>> in_pixels(Box(0, 500, 1000, 1000), "thousand", 200, 100)
        Box(left=0.0, top=50.0, right=200.0, bottom=100.0)
    """
    if scale == "pixels":
        return box
    if scale == "padded":
        side = max(width, height)
        x, y = (side - width) / 2, (side - height) / 2
        return Box(box.left * side - x, box.top * side - y, box.right * side - x, box.bottom * side - y)
    unit = 1000 if scale == "thousand" else 1
    return Box(box.left * width / unit, box.top * height / unit, box.right * width / unit, box.bottom * height / unit)
