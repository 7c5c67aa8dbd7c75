"""What open questions about videos share: their files, and who decides whether an answer is right."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from mmfast.eval.datasets.files import Row, json_rows
from mmfast.eval.datasets.local import SHORT_ANSWER, LocalTask, one_of
from mmfast.eval.metrics.judge import Judge, Request, read_replies, read_verdict
from mmfast.eval.metrics.text import contains, exact, normalise_vqa
from mmfast.eval.task import Media, Outcome, Sample, Scored

SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".MP4")

_RULES = {"exact": exact, "contains": contains}


@dataclass(frozen=True)
class OpenVideoTask(LocalTask):
    """Open questions about videos, answered in a word or phrase.

    Published numbers are a judge's, and differ by up to ten points between judges. ``exact`` and ``contains``
    need none, and are never to be compared with them.

    Args:
        root: the folder.
        split: ``"test"`` or ``"val"``.
        limit: ask only so many questions, the first ones; None for all.
        scoring: ``"exact"`` for the same words, ``"contains"`` for the answer's words in a row in the prediction,
            ``"judge"`` for what ``judge`` or ``replies`` say.
        judge: a callable that replies to a :class:`~mmfast.eval.metrics.Request`.
        replies: a JSONL file of replies to the requests that :meth:`requests` gives.

    Attributes:
        folders: where below ``root`` the videos may lie; "" for ``root`` itself.
    """

    media: ClassVar[Media] = "video"
    metric: ClassVar[str] = "accuracy"
    splits: ClassVar[tuple[str, ...]] = ("test", "val")
    folders: ClassVar[tuple[str, ...]]

    split: str = "test"
    scoring: str = "exact"
    judge: Judge | None = field(default=None, compare=False)
    replies: Path | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option, its value and what is legal.
        """
        super().__post_init__()
        one_of("scoring", self.scoring, (*_RULES, "judge"))
        given = (self.judge is not None) + (self.replies is not None)
        if given != (self.scoring == "judge"):
            raise ValueError(
                f"scoring={self.scoring!r} with {given} of judge and replies: must be scoring='judge' and one of them, "
                "or another scoring and none"
            )

    @abstractmethod
    def video_name(self, row: Row) -> str:
        """Name the video of a question, as its file is called, without folder and suffix."""

    def kind(self, row: Row, answer: Row) -> str:
        """Name the kind of a question: its first word, if that asks for something."""
        word = row.text("question").split(maxsplit=1)[0].lower() if row.text("question").strip() else ""
        return word if word in ("what", "who", "how", "when", "where") else "other"

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""
        questions, answers = self.find(f"{self.split}_q.json"), self.find(f"{self.split}_a.json")
        if questions is not None and answers is not None:
            known = {row.text("question_id"): row for row in json_rows(answers)}
            for row in json_rows(questions):
                if row.text("question_id") not in known:
                    raise row.error(f"question {row.text('question_id')!r} has no answer in {answers}")
                yield self._sample(row, row.text("question_id"), known[row.text("question_id")])
            return
        both = self.find(f"{self.split}_qa.json")
        if both is None:
            raise self.missing()
        for row in json_rows(both):
            yield self._sample(row, row.text("id"), row)

    def _sample(self, row: Row, name: str, answer: Row) -> Sample:
        video = row.file(self.folder(), *in_folders(self.folders, self.video_name(row)))
        asked = row.text("question").strip()
        question = asked if asked.endswith("?") else f"{asked}?"
        return Sample(
            sample_id=name,
            question=question + SHORT_ANSWER,
            answers=(answer.text("answer"),),
            video=video,
            category=self.kind(row, answer),
            cluster=video.stem,
            details={"stem": question},
        )

    @cached_property
    def _replies(self) -> Mapping[str, str]:
        return read_replies(self.replies) if self.replies is not None else {}

    def requests(self, outcomes: Sequence[Outcome]) -> Iterator[Request]:
        """Yield what a judge is to be asked, for :func:`~mmfast.eval.metrics.write_requests`; failed ones are not."""
        return (_request(one.sample, one.prediction) for one in outcomes if one.prediction.strip())

    def score(self, sample: Sample, prediction: str) -> Scored:
        """Score 1.0 for a right answer; what no verdict could be read for is wrong, and counted."""
        if self.scoring in _RULES:
            return Scored(_RULES[self.scoring](prediction, sample.answers), normalise_vqa(prediction))
        if not prediction.strip():
            return Scored(0.0, "", {"judge_score": 0.0, "unjudged": 0.0})
        request = _request(sample, prediction)
        reply = self.judge(request) if self.judge is not None else self._replies.get(sample.sample_id, "")
        verdict = read_verdict(reply)
        if verdict is None:
            return Scored(0.0, "", {"judge_score": 0.0, "unjudged": 1.0})
        parsed = "yes" if verdict.right else "no"
        return Scored(float(verdict.right), parsed, {"judge_score": verdict.score, "unjudged": 0.0})

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Name the accuracy by its scoring too; of a judge add mean score and accuracy over what it judged."""
        figures = super().summary(outcomes)
        if not outcomes:
            return figures
        figures[f"accuracy_{self.scoring}"] = figures["accuracy"]
        if self.scoring == "judge":
            judged = [one for one in outcomes if not one.scored.details.get("unjudged")]
            total = max(len(judged), 1)
            figures["accuracy_judged"] = 100 * sum(one.scored.score for one in judged) / total
            figures["judge_score"] = sum(float(one.scored.details.get("judge_score", 0.0)) for one in judged) / total
            figures["n_unjudged"] = float(len(outcomes) - len(judged))
        return figures


def in_folders(folders: Sequence[str], name: str, suffixes: Sequence[str] = SUFFIXES) -> tuple[str, ...]:
    """Name a video by all the folders and suffixes that it may have.

    Example:
        >>> in_folders(("videos",), "v_1", (".mp4", ".mkv"))
        ('videos/v_1.mp4', 'videos/v_1.mkv')
    """
    return tuple(f"{folder}/{name}{suffix}" if folder else name + suffix for folder in folders for suffix in suffixes)


def _request(sample: Sample, prediction: str) -> Request:
    return Request(sample.sample_id, str(sample.details.get("stem", sample.question)), sample.answers[0], prediction)
