"""SEED-Bench: multiple-choice questions about images, and about clips shown as frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from mmfast.eval.datasets.files import Row, read_json, rows_of
from mmfast.eval.datasets.local import LETTER_ANSWER, ChoiceTask, detail, lettered
from mmfast.eval.task import Media, Outcome, Sample, by_kind

_LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Seed(ChoiceTask):
    """SEED-Bench (Li et al., 2023): 14,233 questions about images; 19,242 with those about clips.

    "SEED" of papers before 2024 is all of them, of newer ones the images.

    Args:
        root: the folder.
        split: ``"image"``, ``"video"`` or ``"all"``. In the published layout a clip is the one frame from its
            middle that LLaVA's tool extracts; the export has several.
        limit: ask only so many questions, the first ones; None for all.
        parser: how a letter is read out of an answer.
        unparsed: what becomes of an answer without a letter: ``"wrong"`` or ``"guess"``.
    """

    name: ClassVar[str] = "seed"
    media: ClassVar[Media] = "image"
    chance: ClassVar[float] = 25.0
    paper: ClassVar[str] = "arXiv:2307.16125"
    splits: ClassVar[tuple[str, ...]] = ("image", "video", "all")
    source: ClassVar[str] = "SEED-Bench.json and the images of SEED-Bench (AILab-CVC/SEED-Bench)"
    layout: ClassVar[tuple[str, ...]] = (
        "SEED-Bench.json",
        "SEED-Bench-image/<data_id>",
        "SEED-Bench-video-image/<question_type_id>_<question_id>.png for clips",
    )
    export: ClassVar[str] = "lmms-lab/SEED-Bench"

    split: str = "image"
    parser: str = "seed_first_char"

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""
        path = self.find("SEED-Bench.json")
        if path is None:
            for row in self.exported("test"):
                if self._asked(row):
                    yield self._sample(row, self._frames(row), row.text("question_type_id", ""))
            return
        content = Row(str(path), {"content": read_json(path)}).get("content")
        if not isinstance(content, dict) or not isinstance(content.get("question_type"), dict):
            raise ValueError(f"{path}: must be an object with questions and question_type")
        names = {str(number): name for name, number in content["question_type"].items()}
        for row in rows_of(content.get("questions"), str(path)):
            if self._asked(row):
                kind = row.text("question_type_id")
                image = f"SEED-Bench-image/{row.text('data_id')}"
                frame = f"SEED-Bench-video-image/{kind}_{row.text('question_id')}.png"
                named = image if row.text("data_type") == "image" else frame
                yield self._sample(row, (row.file(self.folder(), named),), names.get(kind, kind))

    def _asked(self, row: Row) -> bool:
        kind = row.choice("data_type", ("image", "video"))
        return self.split in ("all", kind)

    def _frames(self, row: Row) -> tuple[Image.Image | Path, ...]:
        value = row.get("image")
        frames = value if isinstance(value, list) else [value]
        return tuple(Row(row.place, {"image": frame}).image("image", self.folder()) for frame in frames)

    def _sample(self, row: Row, pictures: tuple[Image.Image | Path, ...], kind: str) -> Sample:
        choices = tuple(row.text(f"choice_{letter.lower()}") for letter in _LETTERS)
        return Sample(
            sample_id=row.text("question_id"),
            question=row.text("question") + lettered(choices) + LETTER_ANSWER,
            answers=(row.choice("answer", _LETTERS),),
            images=pictures,
            choices=choices,
            category=kind,
            cluster=row.text("data_id", ""),
            details={"data_type": row.text("data_type")},
        )

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Add the accuracies on images and on clips."""
        kinds = by_kind(outcomes, lambda outcome: detail(outcome, "data_type"))
        return super().summary(outcomes) | {f"accuracy/{kind}": value for kind, value in kinds.items()}
