"""MMMU: questions of college courses in thirty subjects."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmfast.eval.datasets.files import Row
from mmfast.eval.datasets.local import LETTER_ANSWER, SHORT_ANSWER, ChoiceTask, lettered, mean_over_kinds
from mmfast.eval.metrics.choice import letters_of
from mmfast.eval.metrics.numbers import mmmu_open
from mmfast.eval.task import Media, Outcome, Sample, Scored

_IMAGE = re.compile(r"<image (\d)>")
_SUBJECT = re.compile(r"^[a-z]+_(.+)_\d+$")


@dataclass(frozen=True)
class Mmmu(ChoiceTask):
    """MMMU (Yue et al., 2023): 900 validation questions, 30 in each subject, some of them open.

    The headline is the mean over subjects, which on the whole split is the plain mean. Published tools guess
    where no letter is read; ask for that with ``unparsed="guess"``.

    Args:
        root: the folder.
        split: ``"validation"`` or ``"dev"``.
        limit: ask only so many questions, the first ones; None for all.
        parser: how a letter is read out of an answer.
        unparsed: what becomes of an answer without a letter: ``"wrong"`` or ``"guess"``.
    """

    name: ClassVar[str] = "mmmu"
    media: ClassVar[Media] = "image"
    chance: ClassVar[float] = 22.1  # as published, for the validation split
    paper: ClassVar[str] = "arXiv:2311.16502"
    splits: ClassVar[tuple[str, ...]] = ("validation", "dev")
    source: ClassVar[str] = "the parquet files of MMMU (Hugging Face data set MMMU/MMMU)"
    layout: ClassVar[tuple[str, ...]] = ("<Subject>/{split}-00000-of-00001.parquet",)
    export: ClassVar[str] = "lmms-lab/MMMU"

    split: str = "validation"
    parser: str = "mmmu_style"

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""
        yield from map(self._sample, self.exported())

    def _sample(self, row: Row) -> Sample:
        name = row.text("id")
        subject = _SUBJECT.match(name)
        if subject is None:
            raise row.error(f"id is {name!r}; it must be <split>_<Subject>_<number>")
        is_open = row.choice("question_type", ("multiple-choice", "open")) == "open"
        choices = () if is_open else _options(row)
        answers = _answers(row) if is_open else (row.choice("answer", letters_of(choices, row.place)),)
        question = row.text("question") + (lettered(choices) + LETTER_ANSWER if choices else SHORT_ANSWER)
        # The options may be pictures too.
        shown = dict.fromkeys(_IMAGE.findall(question))
        return Sample(
            sample_id=name,
            question=question,
            answers=answers,
            images=tuple(row.image(f"image_{number}", self.folder()) for number in shown),
            choices=choices,
            category=subject.group(1),
        )

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Score the letter, or in open questions the number or text."""
        if sample.choices:
            return super().score(sample, prediction)
        text = prediction.strip()
        return Scored(mmmu_open(text, sample.answers) if text else 0.0, text)

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Report the mean over subjects, the plain mean, and each subject."""
        return mean_over_kinds(super().summary(outcomes), outcomes)


def _options(row: Row) -> tuple[str, ...]:
    """The options, which the published files hold as a list written out in Python."""
    value = row.get("options")
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise row.error(f"options is {value[:80]!r}; it must be a list") from None
    choices = Row(row.place, {"options": value}).texts("options")
    if not choices:
        raise row.error("options is empty; a multiple-choice question needs some")
    return choices


def _answers(row: Row) -> tuple[str, ...]:
    """The accepted answers of an open question: one text, or a list written out in Python."""
    text = row.text("answer")
    if text.startswith("["):
        try:
            return tuple(map(str, ast.literal_eval(text)))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise row.error(f"answer is {text[:80]!r}; it must be text or a list") from None
    return (text,)
