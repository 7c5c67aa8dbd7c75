"""What data sets in local folders share: finding their files, saying what is missing, options and letters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import ClassVar

from mmfast.eval.datasets.files import Row, rows
from mmfast.eval.metrics.choice import PARSERS, guess, letters_of
from mmfast.eval.task import Outcome, Sample, Scored, Task, percent

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."

UNPARSED: tuple[str, ...] = ("wrong", "guess")


@dataclass(frozen=True)
class LocalTask(Task):
    """A data set in a folder of the user, in its published layout or as an export of the Hugging Face data set.

    Args:
        root: the folder.
        split: which part of the data set.
        limit: ask only so many questions, the first ones; None for all.

    Attributes:
        splits: the parts that come with answers.
        source: what to download from where.
        layout: the files below ``root``, ``{split}`` standing for the part.
        export: name of the Hugging Face data set whose parquet files are read too; "" if there is none.
    """

    splits: ClassVar[tuple[str, ...]]
    source: ClassVar[str]
    layout: ClassVar[tuple[str, ...]]
    export: ClassVar[str] = ""

    root: Path | None = None
    split: str = ""
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option, its value and what is legal.
        """
        one_of("split", self.split, self.splits)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: must be at least 1, or None for all questions")

    @abstractmethod
    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""

    def samples(self) -> Iterator[Sample]:
        """Yield the questions.

        Raises:
            FileNotFoundError: naming what to download and where it must lie.
            ValueError: naming file and line of a record that cannot be read.
        """
        yield from islice(self.read(), self.limit)

    def folder(self) -> Path:
        """Return the folder with the files.

        Raises:
            FileNotFoundError: naming what to download and where it must lie.
        """
        if self.root is None or not Path(self.root).is_dir():
            raise self.missing()
        return Path(self.root)

    def find(self, *names: str) -> Path | None:
        """Return the first of some files or folders below ``root`` that exists, or None."""
        paths = (self.folder() / name for name in names)
        return next((path for path in paths if path.exists()), None)

    def exported(self, *parts: str, config: str = "") -> Iterator[Row]:
        """Read the export of the Hugging Face data set: parquet, or JSONL with the names of image files.

        Args:
            parts: names that the split may have there; that of the task if there is none.
            config: sub-folder of the configuration.

        Raises:
            FileNotFoundError: naming what to download and where it must lie.
        """
        places = (f"{config}/", "data/", "") if config else ("data/", "", "*/")
        patterns = (
            f"{place}{part}{tail}{suffix}"
            for part in parts or (self.split,)
            for suffix in (".parquet", ".jsonl")
            for place in places
            for tail in ("-*", "")
        )
        found = next((paths for pattern in patterns if (paths := sorted(self.folder().glob(pattern)))), None)
        if found is None:
            raise self.missing()
        return chain.from_iterable(map(rows, found))

    def missing(self) -> FileNotFoundError:
        """Make the error that says what to download and where it must lie."""
        where = "root is not given" if self.root is None else f"{self.root} holds none of the files of {self.name}"
        files = ", ".join(line.format(split=self.split) for line in self.layout)
        export = f"; or the parquet files of the Hugging Face data set {self.export}" if self.export else ""
        return FileNotFoundError(
            f"{where}: download {self.source}, and give as root the folder that holds {files}{export}"
        )


@dataclass(frozen=True)
class ChoiceTask(LocalTask):
    """A data set of multiple-choice questions.

    Args:
        root: the folder.
        split: which part of the data set.
        limit: ask only so many questions, the first ones; None for all.
        parser: how a letter is read out of an answer, one of :data:`mmfast.eval.metrics.PARSERS`.
        unparsed: what becomes of an answer in which no letter was read: ``"wrong"``, or ``"guess"`` for a letter
            drawn from the name of the sample, as tools that publish guessed scores do.
    """

    metric: ClassVar[str] = "accuracy"

    parser: str = "priority_extract"
    unparsed: str = "wrong"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option, its value and what is legal.
        """
        super().__post_init__()
        one_of("parser", self.parser, tuple(PARSERS))
        one_of("unparsed", self.unparsed, UNPARSED)

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Compare the letter read with the right one; an empty prediction is wrong."""
        letters, text = letters_of(sample.choices, f"sample {sample.sample_id}"), prediction.strip()
        found = PARSERS[self.parser](text, sample.choices) if text else ""
        read = found != "" and found in letters
        if text and not found and self.unparsed == "guess":
            found = guess(letters, f"{self.name}:{sample.sample_id}")
        return Scored(float(found == sample.answers[0]), found, {"unparsed": float(not read)})

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Add to the accuracies how many answers held no letter."""
        figures = super().summary(outcomes)
        return figures | count_unparsed(outcomes) if outcomes else figures


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse an option that is none of a few.

    Raises:
        ValueError: naming the option, its value and what is legal.

    Example:
        >>> one_of("split", "tset", ("val", "test"))
        Traceback (most recent call last):
        ValueError: split='tset': must be one of val, test
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")


def lettered(choices: Sequence[str]) -> str:
    r"""List options, each on a line of its own.

    Example:
        >>> lettered(["a red car", "two dogs"])
        '\nA. a red car\nB. two dogs'
    """
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters_of(choices), choices, strict=True))


def count_unparsed(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Count the answers in which no letter was read."""
    return {"n_unparsed": float(sum(bool(outcome.scored.details.get("unparsed")) for outcome in outcomes))}


def mean_over_kinds(figures: dict[str, float], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Make the mean over kinds of question the headline; the plain mean stays as ``accuracy_plain``."""
    kinds = [value for name, value in figures.items() if name.startswith("accuracy/")]
    if not kinds:
        return figures
    plain = percent([outcome.scored.score for outcome in outcomes])
    return figures | {"accuracy": sum(kinds) / len(kinds), "accuracy_plain": plain}


def detail(outcome: Outcome, name: str) -> str:
    """Return a detail of the question as text; "" if it has none of this name."""
    return str(outcome.sample.details.get(name, ""))
