"""MLVU: seven kinds of questions about videos of minutes to hours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmfast.eval.datasets.files import Row, json_rows
from mmfast.eval.datasets.local import ChoiceTask, mean_over_kinds
from mmfast.eval.datasets.mvbench import option_question
from mmfast.eval.metrics.choice import letters_of
from mmfast.eval.task import Media, Outcome, Sample

_FILES = {
    "plotQA": "1_plotQA",
    "needle": "2_needle",
    "ego": "3_ego",
    "count": "4_count",
    "order": "5_order",
    "anomaly_reco": "6_anomaly_reco",
    "topic_reasoning": "7_topic_reasoning",
}


@dataclass(frozen=True)
class Mlvu(ChoiceTask):
    """MLVU (Zhou et al., 2024), the multiple-choice part of the dev set: 2,174 questions.

    The headline is M-Avg, the mean over the kinds; ``accuracy_plain`` is the mean over questions. Papers print
    both as "MLVU".

    Args:
        root: the folder.
        split: ``"dev"`` or one kind, as ``"needle"``.
        limit: ask only so many questions, the first ones; None for all.
        parser: how a letter is read out of an answer.
        unparsed: what becomes of an answer without a letter: ``"wrong"`` or ``"guess"``.
    """

    name: ClassVar[str] = "mlvu"
    media: ClassVar[Media] = "video"
    chance: ClassVar[float] = 25.0
    paper: ClassVar[str] = "arXiv:2406.04264"
    splits: ClassVar[tuple[str, ...]] = ("dev", *_FILES)
    source: ClassVar[str] = "the json and video folders of MLVU dev (Hugging Face data set MLVU/MVLU)"
    layout: ClassVar[tuple[str, ...]] = ("json/<number>_<kind>.json", "video/<number>_<kind>/<video>")

    split: str = "dev"

    def read(self) -> Iterator[Sample]:
        """Yield all questions, kind by kind."""
        for kind in _FILES if self.split == "dev" else (self.split,):
            path = self.find(f"json/{_FILES[kind]}.json")
            if path is None:
                raise self.missing()
            for number, row in enumerate(json_rows(path), start=1):
                yield self._sample(row, kind, number)

    def _sample(self, row: Row, kind: str, number: int) -> Sample:
        video, choices = row.text("video"), tuple(choice.strip() for choice in row.texts("candidates"))
        answer = letters_of(choices, row.place)[choices.index(row.choice("answer", choices))]
        return Sample(
            sample_id=f"{kind}/{number}",
            question=option_question(row.text("question"), choices),
            answers=(answer,),
            video=row.file(self.folder(), f"video/{_FILES[kind]}/{video}", f"video/{kind}/{video}"),
            choices=choices,
            category=kind,
            cluster=video,
        )

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Report the mean over kinds, the plain mean, and each kind."""
        return mean_over_kinds(super().summary(outcomes), outcomes)
