"""What every data set is to the rest of this room: samples, a score for each answer, and their summary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from PIL import Image

Media = Literal["image", "video", "text", "mixed"]
"""What the questions of a task are about; "mixed" for data in which they differ."""


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        sample_id: unique within its task, and the same on every machine and in every run.
        question: the whole text put to the model, with the prompt tail that the data set asks for.
        answers: accepted answers, in the data set's own form; several where people disagreed.
        images: pictures, opened or as files, in the order in which the prompt shows them.
        frames: frames of a clip that is no video file, opened or as files.
        frames_per_second: how many of these frames show one second.
        video: a video file, read only when the question is asked.
        start: where in the video the question looks, in seconds.
        end: where it stops looking; None for the end of the file.
        choices: the options of a multiple-choice question, without their letters.
        category: the data set's own kind of question, for accuracy by kind; "" where it has none.
        cluster: what correlated questions share (the picture or the video); "" for the sample itself.
        details: anything else that the scorer or the summary of this data set needs.
    """

    sample_id: str
    question: str
    answers: tuple[str, ...]
    images: tuple[Image.Image | Path, ...] = ()
    frames: tuple[Image.Image | Path, ...] = ()
    frames_per_second: float = 1.0
    video: Path | None = None
    start: float = 0.0
    end: float | None = None
    choices: tuple[str, ...] = ()
    category: str = ""
    cluster: str = ""
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """What became of one answer.

    Attributes:
        score: 0 to 1 for most metrics; the task's own scale otherwise.
        parsed: what the scorer read out of the raw text; "" where it could read nothing.
        details: further figures of this one answer that the summary needs.
    """

    score: float
    parsed: str = ""
    details: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """One answered question, as the summary of a task sees it.

    Attributes:
        sample: the question.
        prediction: the model's raw text; "" where it failed.
        scored: what the scorer made of it.
    """

    sample: Sample
    prediction: str
    scored: Scored


@dataclass(frozen=True)
class Task(ABC):
    """A data set with its scorer. Options of a data set are the fields of its class.

    Reading a task twice gives the same samples in the same order.

    Attributes:
        name: what users write, for example ``"textvqa"``.
        media: what its questions are about.
        metric: the headline of its summary, a key of what :meth:`summary` returns.
        max_new_tokens: tokens an answer may have.
        chance: the headline of blind guessing, in its own scale; 0.0 for open questions.
        paper: where the data set was published.
        version: raised with every change of its questions or its scorer, so that results before and after are never
            mixed.
    """

    name: ClassVar[str]
    media: ClassVar[Media]
    metric: ClassVar[str] = "accuracy"
    max_new_tokens: ClassVar[int] = 16
    chance: ClassVar[float] = 0.0
    paper: ClassVar[str] = ""
    version: ClassVar[int] = 1

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """Yield the questions.

        Raises:
            FileNotFoundError: naming what to download and where it must lie.
            ValueError: naming file and line of a record that cannot be read.
        """

    @abstractmethod
    def score(self, sample: Sample, prediction: str) -> Scored:
        """Score one raw answer. An empty prediction scores as wrong, and never raises."""

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Summarise; the first key is the headline. Data sets with rules of their own override this.

        Args:
            outcomes: every question asked, failed ones among them with an empty prediction.

        Returns:
            Figures by name, accuracies in percent; empty for no outcomes.
        """
        if not outcomes:
            return {}
        plain = percent([outcome.scored.score for outcome in outcomes])
        kinds = by_kind(outcomes, lambda outcome: outcome.sample.category)
        return {self.metric: plain} | {f"{self.metric}/{kind}": value for kind, value in kinds.items()}


def percent(scores: Sequence[float]) -> float:
    """Average scores, in percent; 0.0 for none.

    Example:
        >>> percent([1.0, 0.0])
        50.0
    """
    return 100 * sum(scores) / len(scores) if scores else 0.0


def by_kind(outcomes: Sequence[Outcome], kind: Callable[[Outcome], str]) -> dict[str, float]:
    """Average scores by what ``kind`` says, in percent, in alphabetical order; "" is left out."""
    found: dict[str, list[float]] = {}
    for outcome in outcomes:
        found.setdefault(kind(outcome), []).append(outcome.scored.score)
    return {name: percent(found[name]) for name in sorted(found) if name}
