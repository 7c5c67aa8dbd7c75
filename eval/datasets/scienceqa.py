"""ScienceQA: school questions, half of them with a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from mmfast.eval.datasets.files import Row, named_rows, read_json
from mmfast.eval.datasets.local import LETTER_ANSWER, ChoiceTask, lettered
from mmfast.eval.metrics.choice import letters_of
from mmfast.eval.task import Media, Sample


@dataclass(frozen=True)
class ScienceQa(ChoiceTask):
    """ScienceQA (Lu et al., 2022): 4,241 test questions, 2,017 of them with an image ("SQA-IMG" in papers).

    Beware: answers without any image score nearly as high as with it.

    Args:
        root: the folder.
        split: ``"test"``, ``"val"`` or ``"train"``.
        limit: ask only so many questions, the first ones; None for all.
        parser: how a letter is read out of an answer.
        unparsed: what becomes of an answer without a letter: ``"wrong"`` or ``"guess"``.
        images_only: leave out the questions without an image.
    """

    name: ClassVar[str] = "scienceqa"
    media: ClassVar[Media] = "image"
    chance: ClassVar[float] = 40.1  # as published, for questions with an image
    paper: ClassVar[str] = "arXiv:2209.09513"
    splits: ClassVar[tuple[str, ...]] = ("test", "val", "train")
    source: ClassVar[str] = "problems.json, pid_splits.json and the images of ScienceQA (lupantech/ScienceQA)"
    layout: ClassVar[tuple[str, ...]] = ("problems.json", "pid_splits.json", "images/{split}/<id>/image.png")
    export: ClassVar[str] = "lmms-lab/ScienceQA"

    split: str = "test"
    parser: str = "scienceqa"
    images_only: bool = True

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""
        problems, parts = self.find("problems.json"), self.find("pid_splits.json")
        if problems is None or parts is None:
            part = "validation" if self.split == "val" else self.split
            config = "ScienceQA-IMG" if self.images_only else "ScienceQA-FULL"
            for number, row in enumerate(self.exported(part, config=config)):
                if row.values.get("image") is not None or not self.images_only:
                    yield self._sample(row, row.text("id", str(number)))
            return
        wanted = Row(str(parts), {"parts": read_json(parts)}).get("parts")
        if not isinstance(wanted, dict) or not isinstance(wanted.get(self.split), list):
            raise ValueError(f"{parts}: must be an object with a list {self.split}")
        known = dict(named_rows(problems))
        for name in wanted[self.split]:
            if name not in known:
                raise ValueError(f"{parts}: {self.split} names {name!r}, which is not in {problems}")
            if known[name].values.get("image") or not self.images_only:
                yield self._sample(known[name], str(name))

    def _sample(self, row: Row, name: str) -> Sample:
        image, choices, hint = row.values.get("image"), row.texts("choices"), row.text("hint", "")
        pictures: tuple[Image.Image | Path, ...] = ()
        if isinstance(image, str):
            places = (f"images/{self.split}/{name}/{image}", f"{self.split}/{name}/{image}", image)
            pictures = (row.file(self.folder(), *places),)
        elif image is not None:
            pictures = (row.image("image", self.folder()),)
        context = f"Context: {hint}\n" if hint else ""
        letters = letters_of(choices, row.place)
        return Sample(
            sample_id=name,
            question=context + row.text("question") + lettered(choices) + LETTER_ANSWER,
            answers=(letters[row.integer("answer", 0, len(letters) - 1)],),
            images=pictures,
            choices=choices,
            category=row.text("subject", ""),
        )
