"""EgoSchema: three minutes through somebody's eyes, and what they were about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmfast.eval.datasets.files import Row, json_rows, read_json
from mmfast.eval.datasets.local import LETTER_ANSWER, ChoiceTask, lettered
from mmfast.eval.datasets.open_video import in_folders
from mmfast.eval.metrics.choice import letters_of
from mmfast.eval.task import Media, Sample


@dataclass(frozen=True)
class EgoSchema(ChoiceTask):
    """EgoSchema (Mangalam et al., 2023): the 500 of 5,031 questions whose answers are public.

    Args:
        root: the folder.
        split: ``"subset"``; the whole set is scored by the authors' server alone.
        limit: ask only so many questions, the first ones; None for all.
        parser: how a letter is read out of an answer. Beware of ``"mmmu_style"``, which some tables use: the
            options are about somebody called C, and it takes that for the letter.
        unparsed: what becomes of an answer without a letter: ``"wrong"`` or ``"guess"``.
    """

    name: ClassVar[str] = "egoschema"
    media: ClassVar[Media] = "video"
    chance: ClassVar[float] = 20.0
    paper: ClassVar[str] = "arXiv:2308.09126"
    splits: ClassVar[tuple[str, ...]] = ("subset",)
    source: ClassVar[str] = "questions.json, subset_answers.json and the videos of EgoSchema (egoschema/EgoSchema)"
    layout: ClassVar[tuple[str, ...]] = ("questions.json", "subset_answers.json", "videos/<q_uid>.mp4")
    export: ClassVar[str] = "lmms-lab/egoschema"

    split: str = "subset"

    def read(self) -> Iterator[Sample]:
        """Yield all questions with public answers."""
        questions, answers = self.find("questions.json"), self.find("subset_answers.json")
        if questions is None or answers is None:
            for row in self.exported("test", config="Subset"):
                choices = tuple(unlettered(row.texts("option"), row.place))
                yield self._sample(row, row.text("video_idx"), choices, row)
            return
        known = Row(str(answers), {"answers": read_json(answers)}).get("answers")
        if not isinstance(known, dict):
            raise ValueError(f"{answers}: must be an object of q_uid -> number of the option")
        for row in json_rows(questions):
            if (name := row.text("q_uid")) in known:
                choices = tuple(row.text(f"option {number}") for number in range(5))
                yield self._sample(row, name, choices, Row(f"{answers}, {name}", {"answer": known[name]}))

    def _sample(self, row: Row, name: str, choices: tuple[str, ...], answer: Row) -> Sample:
        letters = letters_of(choices, row.place)
        return Sample(
            sample_id=name,
            question=row.text("question").strip() + lettered(choices) + LETTER_ANSWER,
            answers=(letters[answer.integer("answer", 0, len(letters) - 1)],),
            video=row.file(self.folder(), *in_folders(("videos", ""), name)),
            choices=choices,
            cluster=name,
        )


def unlettered(options: Sequence[str], place: str = "") -> list[str]:
    """Cut the letters off options that come with them.

    Args:
        options: the options; none give none.
        place: file and record, for errors.

    Raises:
        ValueError: if there are more options than letters.

    Example:
        >>> unlettered(["A. a cat", "B. a dog"]), unlettered(["Vitamin C. is", "x"])
        (['a cat', 'a dog'], ['Vitamin C. is', 'x'])
    """
    marks = [f"{letter}." for letter in letters_of(options, place)] if options else []
    if not all(option.startswith(mark) for option, mark in zip(options, marks, strict=True)):
        return list(options)
    return [option.removeprefix(mark).strip() for option, mark in zip(options, marks, strict=True)]
