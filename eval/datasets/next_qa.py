"""NExT-QA: why and how, before and after, and what is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from mmfast.eval.datasets.files import Row, read_json, table_rows
from mmfast.eval.datasets.local import LETTER_ANSWER, ChoiceTask, detail, lettered
from mmfast.eval.datasets.open_video import in_folders
from mmfast.eval.metrics.choice import letters_of
from mmfast.eval.task import Media, Outcome, Sample, by_kind

_KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}
_TYPES = ("CW", "CH", "TN", "TC", "TP", "DC", "DL", "DO", "DB")


@dataclass(frozen=True)
class NextQa(ChoiceTask):
    """NExT-QA (Xiao et al., 2021), multiple choice: 8,564 test and 4,996 validation questions of five options.

    Args:
        root: the folder.
        split: ``"test"`` or ``"val"``.
        limit: ask only so many questions, the first ones; None for all.
        parser: how a letter is read out of an answer.
        unparsed: what becomes of an answer without a letter: ``"wrong"`` or ``"guess"``.
    """

    name: ClassVar[str] = "next-qa"
    media: ClassVar[Media] = "video"
    chance: ClassVar[float] = 20.0
    paper: ClassVar[str] = "arXiv:2105.08276"
    splits: ClassVar[tuple[str, ...]] = ("test", "val")
    source: ClassVar[str] = "the multiple-choice questions and NExTVideo of NExT-QA (doc-doc/NExT-QA)"
    layout: ClassVar[tuple[str, ...]] = (
        "{split}.csv",
        "NExTVideo/<video>.mp4, or map_vid_vidorID.json and NExTVideo/<its path>.mp4",
    )
    export: ClassVar[str] = "lmms-lab/NExTQA"

    split: str = "test"
    parser: str = "mmmu_style"

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""
        path = self.find(f"{self.split}.csv", f"nextqa/{self.split}.csv")
        yield from map(self._sample, table_rows(path) if path else self.exported(config="MC"))

    def _sample(self, row: Row) -> Sample:
        video, kind = row.text("video"), row.choice("type", _TYPES)
        choices = tuple(row.text(f"a{number}").strip() for number in range(5))
        names = {video, self._paths.get(video, video)}
        places = [place for name in sorted(names) for place in in_folders(("NExTVideo", "videos", ""), name)]
        return Sample(
            sample_id=f"{video}_{row.text('qid')}",
            question=row.text("question").strip() + lettered(choices) + LETTER_ANSWER,
            answers=(letters_of(choices)[row.integer("answer", 0, 4)],),
            video=row.file(self.folder(), *places),
            choices=choices,
            category=_KINDS[kind[0]],
            cluster=video,
            details={"type": kind},
        )

    @cached_property
    def _paths(self) -> Mapping[str, str]:
        """Where the videos lie that are sorted into folders."""
        path = self.find("map_vid_vidorID.json", "nextqa/map_vid_vidorID.json")
        found = read_json(path) if path else {}
        if not isinstance(found, dict):
            raise ValueError(f"{path}: must be an object of video -> path")
        return {str(video): str(place) for video, place in found.items()}

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Add the accuracies of each type of question."""
        kinds = by_kind(outcomes, lambda outcome: detail(outcome, "type"))
        return super().summary(outcomes) | {f"accuracy/{kind}": value for kind, value in kinds.items()}
