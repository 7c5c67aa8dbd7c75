"""Data of your own: a table of pictures or videos with questions and answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmfast.eval.datasets.files import Row, rows
from mmfast.eval.datasets.local import LETTER_ANSWER, SHORT_ANSWER, ChoiceTask, lettered, one_of
from mmfast.eval.metrics.choice import letters_of
from mmfast.eval.metrics.text import contains, exact, normalise_vqa
from mmfast.eval.task import Media, Sample, Scored
from mmfast.media import MediaError, kind_of

_RULES = {"exact": exact, "contains": contains}
_TABLES = ("data.jsonl", "data.json", "data.csv", "data.tsv", "data.parquet")


@dataclass(frozen=True)
class Own(ChoiceTask):
    """Questions of your own, in JSONL, JSON, CSV, TSV or parquet.

    Each record has ``question`` and ``answer`` (a text, or a list of accepted ones), ``media`` (the name of an
    image or video beside the table, or a list of images; none for a question of text), and may have ``choices``
    (a list; in CSV and TSV separated by "|"), ``category``, ``id``, ``start`` and ``end`` (seconds of the video).
    The answer to choices is one of them, or its letter.

    Args:
        root: the folder, which holds ``data.jsonl`` or a table of another kind of this name.
        split: ``"all"``.
        limit: ask only so many questions, the first ones; None for all.
        parser: how a letter is read out of an answer.
        unparsed: what becomes of an answer without a letter: ``"wrong"`` or ``"guess"``.
        scoring: how answers to questions without choices are compared, ``"exact"`` or ``"contains"``.
        table: name of the table, if it is another.
    """

    name: ClassVar[str] = "own"
    media: ClassVar[Media] = "mixed"
    splits: ClassVar[tuple[str, ...]] = ("all",)
    source: ClassVar[str] = "nothing, but write a table with media, question and answer"
    layout: ClassVar[tuple[str, ...]] = ("data.jsonl (or .json, .csv, .tsv, .parquet) and the files it names",)

    split: str = "all"
    scoring: str = "exact"
    table: str = ""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option, its value and what is legal.
        """
        super().__post_init__()
        one_of("scoring", self.scoring, tuple(_RULES))

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the table."""
        path = self.find(*((self.table,) if self.table else _TABLES))
        if path is None:
            raise self.missing()
        seen: set[str] = set()
        for number, row in enumerate(rows(path), start=1):
            sample = self._sample(row, row.text("id", str(number)))
            if sample.sample_id in seen:
                raise row.error(f"id {sample.sample_id!r} was there before; each must be another")
            seen.add(sample.sample_id)
            yield sample

    def _sample(self, row: Row, name: str) -> Sample:
        names = _listed(row, "media", "")
        paths = tuple(row.file(self.folder(), place) for place in names)
        kinds = {_kind(row, path) for path in paths}
        if "video" in kinds and len(paths) > 1:
            raise row.error(f"media names {len(paths)} files with a video among them; it must be one video, or images")
        choices = _listed(row, "choices", "|")
        answers = _listed(row, "answer", "")
        if not answers:
            raise row.error("answer is missing or empty; it must be text or a list of texts")
        if choices:
            answers = (_letter(row, answers, choices),)
        start, end = row.seconds("start") or 0.0, row.seconds("end")
        if end is not None and end <= start:
            raise row.error(f"end is {end}; it must be later than start, {start}")
        is_video = kinds == {"video"}
        return Sample(
            sample_id=name,
            question=row.text("question") + (lettered(choices) + LETTER_ANSWER if choices else SHORT_ANSWER),
            answers=answers,
            images=() if is_video else paths,
            video=paths[0] if is_video else None,
            start=start,
            end=end,
            choices=choices,
            category=row.text("category", ""),
            cluster=names[0] if names else "",
        )

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Score the letter, or the words where there are no choices."""
        if sample.choices:
            return super().score(sample, prediction)
        return Scored(_RULES[self.scoring](prediction, sample.answers), normalise_vqa(prediction))


def _listed(row: Row, name: str, separator: str) -> tuple[str, ...]:
    """A field that is a list of texts, one text, or in tables texts with a separator between them."""
    value = row.values.get(name)
    if isinstance(value, list):
        return row.texts(name)
    text = row.text(name, "")
    return tuple(part.strip() for part in (text.split(separator) if separator else (text,)) if part.strip())


def _kind(row: Row, path: Path) -> str:
    try:
        return kind_of(path)
    except MediaError as error:
        raise row.error(f"media: {error}") from None


def _letter(row: Row, answers: tuple[str, ...], choices: tuple[str, ...]) -> str:
    letters, answer = letters_of(choices, row.place), answers[0]
    if answer in choices:
        return letters[choices.index(answer)]
    if len(answers) > 1 or answer not in tuple(letters):
        raise row.error(f"answer is {', '.join(answers)!r}; it must be one of the choices, or one of {letters}")
    return answer
