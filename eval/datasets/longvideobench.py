"""LongVideoBench: questions that refer to a moment in a long video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmfast.eval.datasets.files import Row, json_rows
from mmfast.eval.datasets.local import LETTER_ANSWER, ChoiceTask, detail, lettered
from mmfast.eval.metrics.choice import letters_of
from mmfast.eval.task import Media, Outcome, Sample, by_kind

_ABSENT = "N/A"


@dataclass(frozen=True)
class LongVideoBench(ChoiceTask):
    """LongVideoBench (Wu et al., 2024): 1,337 validation questions of four or five options, without subtitles.

    With subtitles between the frames published numbers are two to three points higher.

    Args:
        root: the folder.
        split: ``"val"``.
        limit: ask only so many questions, the first ones; None for all.
        parser: how a letter is read out of an answer. Published tools use ``"longvideobench"``.
        unparsed: what becomes of an answer without a letter: ``"wrong"`` or ``"guess"``, as published tools do.
    """

    name: ClassVar[str] = "longvideobench"
    media: ClassVar[Media] = "video"
    max_new_tokens: ClassVar[int] = 32
    chance: ClassVar[float] = 20.0  # at least: some questions have four options
    paper: ClassVar[str] = "arXiv:2407.15754"
    splits: ClassVar[tuple[str, ...]] = ("val",)
    source: ClassVar[str] = "lvb_val.json and the unpacked videos of LongVideoBench (longvideobench/LongVideoBench)"
    layout: ClassVar[tuple[str, ...]] = ("lvb_{split}.json", "videos/<video_path>")
    export: ClassVar[str] = "longvideobench/LongVideoBench"

    split: str = "val"
    parser: str = "longvideobench"

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""
        path = self.find(f"lvb_{self.split}.json")
        yield from map(self._sample, json_rows(path) if path else self.exported("validation"))

    def _sample(self, row: Row) -> Sample:
        if "candidates" in row.values:
            choices = row.texts("candidates")
        else:
            options = (row.text(f"option{number}", _ABSENT) for number in range(5))
            choices = tuple(option for option in options if option != _ABSENT)
        if not choices:
            raise row.error("there are no options; candidates must hold some")
        letters = letters_of(choices, row.place)
        return Sample(
            sample_id=row.text("id"),
            question=row.text("question") + lettered(choices) + LETTER_ANSWER,
            answers=(letters[row.integer("correct_choice", 0, len(letters) - 1)],),
            video=row.file(self.folder(), f"videos/{row.text('video_path')}", row.text("video_path")),
            choices=choices,
            category=f"{row.text('duration_group')} s",
            cluster=row.text("video_id"),
            details={"question_category": row.text("question_category", "")},
        )

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Add the accuracies by kind of question to those by length of video."""
        kinds = by_kind(outcomes, lambda outcome: detail(outcome, "question_category"))
        return super().summary(outcomes) | {f"accuracy/{kind}": value for kind, value in kinds.items()}
