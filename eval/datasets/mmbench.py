"""MMBench: multiple-choice questions that count only if they are right in every order of the options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from mmfast.eval.datasets.files import Row, table_rows
from mmfast.eval.datasets.local import LETTER_ANSWER, ChoiceTask, count_unparsed, lettered, one_of
from mmfast.eval.metrics.choice import letters_of
from mmfast.eval.task import Media, Outcome, Sample, Scored, by_kind, percent

_ROTATION = 10**6  # added to the index of a question for each step that its options are turned
_SHORT = 64  # an image that is shorter is the index of the question that has it
_LANGUAGES = ("en", "cn")


@dataclass(frozen=True)
class MmBench(ChoiceTask):
    """MMBench (Liu et al., 2023): the dev split, in English or Chinese; answers of the test split are hidden.

    Published files hold the rotations of each question as rows of their own; where they do not, the rotations
    are made. Answers are read by the rules of the official tool, without the language model it falls back on.

    Args:
        root: the folder.
        split: ``"dev"``.
        limit: ask only so many questions, the first ones, each in all its rotations; None for all.
        parser: how a letter is read out of an answer.
        unparsed: what becomes of an answer without a letter: ``"wrong"`` or ``"guess"``.
        circular: ask all rotations; otherwise each question once, which gives far higher accuracies.
        language: ``"en"`` or ``"cn"``.
    """

    name: ClassVar[str] = "mmbench"
    media: ClassVar[Media] = "image"
    # Four options, guessed right four times.
    chance: ClassVar[float] = 0.4
    paper: ClassVar[str] = "arXiv:2307.06281"
    splits: ClassVar[tuple[str, ...]] = ("dev",)
    source: ClassVar[str] = "the TSV file of MMBench dev (open-compass/MMBench)"
    layout: ClassVar[tuple[str, ...]] = (
        "mmbench_{split}_20230712.tsv, mmbench_{split}_cn_20231003.tsv, MMBENCH_DEV_EN.tsv or MMBENCH_DEV_CN.tsv",
    )
    export: ClassVar[str] = "lmms-lab/MMBench"

    split: str = "dev"
    parser: str = "mmbench_rules"
    circular: bool = True
    language: str = "en"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option, its value and what is legal.
        """
        super().__post_init__()
        one_of("language", self.language, _LANGUAGES)
        if not self.circular:
            object.__setattr__(self, "chance", 25.0)

    def samples(self) -> Iterator[Sample]:
        """Yield the questions; ``limit`` counts them, not their rotations.

        Raises:
            FileNotFoundError: naming what to download and where it must lie.
            ValueError: naming file and line of a record that cannot be read.
        """
        asked: set[str] = set()
        for sample in self.read():
            if sample.cluster not in asked and len(asked) == self.limit:
                continue
            asked.add(sample.cluster)
            yield sample

    def read(self) -> Iterator[Sample]:
        """Yield all questions, and their rotations."""
        rotated = any(row.integer("index", 0, 10**9) >= _ROTATION for row in self._rows())
        pictures: dict[str, Row] = {}
        for row in self._rows():
            index = row.integer("index", 0, 10**9)
            if index >= _ROTATION and not self.circular:
                continue
            sample = self._sample(row, index, pictures)
            yield sample
            if self.circular and not rotated:
                yield from (turned(sample, index, step) for step in range(1, len(sample.choices)))

    def _rows(self) -> Iterator[Row]:
        mark, name = ("", "EN") if self.language == "en" else ("cn_", "CN")
        date = "20230712" if self.language == "en" else "20231003"
        names = (f"mmbench_dev_{mark}{date}.tsv", f"MMBENCH_DEV_{name}.tsv", f"MMBench_DEV_{name}.tsv")
        path = self.find(*names)
        return table_rows(path, "\t") if path else self.exported(config=self.language)

    def _sample(self, row: Row, index: int, pictures: dict[str, Row]) -> Sample:
        image = row.get("image")
        if not isinstance(image, str):
            picture = row.image("image", self.folder())
        elif len(image) > _SHORT:
            if index < _ROTATION:
                pictures[str(index)] = row
            picture = row.base64_image("image")
        elif image in pictures:
            picture = pictures[image].base64_image("image")
        else:
            raise row.error(f"image is {image!r}; no question above has this index")
        choices = tuple(text for letter in "ABCDE" if (text := _cell(row, letter)))
        if not choices:
            raise row.error("no options; A, B, ... must hold them")
        hint = _cell(row, "hint")
        question = f"{hint}\n{row.text('question')}" if hint else row.text("question")
        return Sample(
            sample_id=str(index),
            question=question + lettered(choices) + LETTER_ANSWER,
            answers=(row.choice("answer", letters_of(choices)),),
            images=(picture,),
            choices=choices,
            category=row.text("category", ""),
            cluster=str(index % _ROTATION),
            details={"stem": question},
        )

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Report the share of questions right in all their rotations, overall and by category.

        ``accuracy_plain`` is the share of right answers in the order of the file, ``n_incomplete`` the number of
        questions that were not asked in all their rotations, which makes them easier.
        """
        if not outcomes:
            return {}
        groups: dict[str, list[Outcome]] = {}
        for outcome in outcomes:
            groups.setdefault(outcome.sample.cluster, []).append(outcome)
        # One outcome stands for its question, and its score for all rotations.
        whole = [
            replace(group[0], scored=Scored(min(outcome.scored.score for outcome in group)))
            for group in groups.values()
        ]
        plain = [outcome.scored.score for outcome in outcomes if int(outcome.sample.sample_id) < _ROTATION]
        kinds = by_kind(whole, lambda outcome: outcome.sample.category)
        figures = {"accuracy": percent([outcome.scored.score for outcome in whole]), "accuracy_plain": percent(plain)}
        figures |= {f"accuracy/{kind}": value for kind, value in kinds.items()} | count_unparsed(outcomes)
        if self.circular:
            short = sum(len(group) < len(group[0].sample.choices) for group in groups.values())
            figures["n_incomplete"] = float(short)
        return figures


def _cell(row: Row, name: str) -> str:
    """A field that exports fill with "nan" where it is empty."""
    text = row.text(name, "")
    return "" if text == "nan" else text


def turned(sample: Sample, index: int, step: int) -> Sample:
    """Turn the options of a question: the last ``len - step`` come first.

    Example:
        >>> sample = Sample("7", "?", ("A",), choices=("x", "y", "z"), details={"stem": "What?"})
        >>> turned(sample, 7, 1).choices, turned(sample, 7, 1).answers, turned(sample, 7, 1).sample_id
        (('y', 'z', 'x'), ('C',), '1000007')
    """
    choices = sample.choices[step:] + sample.choices[:step]
    letters = letters_of(choices)
    answer = letters[(letters.index(sample.answers[0]) - step) % len(letters)]
    return replace(
        sample,
        sample_id=str(index + step * _ROTATION),
        question=str(sample.details["stem"]) + lettered(choices) + LETTER_ANSWER,
        answers=(answer,),
        choices=choices,
    )
