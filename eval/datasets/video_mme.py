"""Video-MME: videos from seconds to an hour, with and without their subtitles."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmfast.eval.datasets.egoschema import unlettered
from mmfast.eval.datasets.files import Row
from mmfast.eval.datasets.local import ChoiceTask, detail, lettered
from mmfast.eval.datasets.open_video import in_folders
from mmfast.eval.metrics.choice import letters_of
from mmfast.eval.task import Media, Outcome, Sample, by_kind

_LENGTHS = ("short", "medium", "long")
_MARKUP = re.compile(r"<[^>]*>")
_HEAD = (
    "Select the best answer to the following multiple-choice question based on the video{extra}. "
    "Respond with only the letter ({letters}) of the correct option.\n"
)
_TAIL = "\nThe best answer is:"


@dataclass(frozen=True)
class VideoMme(ChoiceTask):
    """Video-MME (Fu et al., 2024): 2,700 questions on 900 videos, a third each short, medium and long.

    Args:
        root: the folder.
        split: ``"all"``, ``"short"``, ``"medium"`` or ``"long"``.
        limit: ask only so many questions, the first ones; None for all.
        parser: how a letter is read out of an answer.
        unparsed: what becomes of an answer without a letter: ``"wrong"`` or ``"guess"``.
        subtitles: put all subtitles of the video before the question; a video without any is asked without.
    """

    name: ClassVar[str] = "video-mme"
    media: ClassVar[Media] = "video"
    chance: ClassVar[float] = 25.0
    paper: ClassVar[str] = "arXiv:2405.21075"
    splits: ClassVar[tuple[str, ...]] = ("all", *_LENGTHS)
    source: ClassVar[str] = (
        "the questions and the unpacked videos and subtitles of Video-MME (MME-Benchmarks/Video-MME)"
    )
    layout: ClassVar[tuple[str, ...]] = (
        "videomme/test-00000-of-00001.parquet",
        "data/<videoID>.mp4",
        "subtitle/<videoID>.srt",
    )
    export: ClassVar[str] = "lmms-lab/Video-MME"

    split: str = "all"
    subtitles: bool = False

    def read(self) -> Iterator[Sample]:
        """Yield all questions of the split."""
        for row in self.exported("test", config="videomme"):
            if self.split in ("all", row.choice("duration", _LENGTHS)):
                yield self._sample(row)

    def _sample(self, row: Row) -> Sample:
        video, choices = row.text("videoID"), tuple(unlettered(row.texts("options"), row.place))
        words = self._words(row, video) if self.subtitles else ""
        letters = tuple(letters_of(choices, row.place))
        listed = f"{', '.join(letters[:-1])}, or {letters[-1]}"
        head = _HEAD.format(extra=" and the subtitles" if words else "", letters=listed)
        shown = f"This video's subtitles are listed below:\n{words}\n" if words else ""
        return Sample(
            sample_id=row.text("question_id"),
            question=shown + head + row.text("question").strip() + lettered(choices) + _TAIL,
            answers=(row.choice("answer", letters),),
            video=row.file(self.folder(), *in_folders(("data", "videos", ""), video)),
            choices=choices,
            category=row.text("duration"),
            cluster=video,
            details={"task_type": row.text("task_type", ""), "domain": row.text("domain", "")},
        )

    def _words(self, row: Row, video: str) -> str:
        """The subtitles of a video, without their numbers, times and markup."""
        if self.find("subtitle") is None:
            raise FileNotFoundError(f"{self.root}: there is no folder subtitle; download {self.source}")
        try:
            path = row.file(self.folder(), f"subtitle/{video}.srt")
        except FileNotFoundError:
            # Not every video has any.
            return ""
        blocks = path.read_text(encoding="utf-8-sig").replace("\r", "").split("\n\n")
        lines = (_MARKUP.sub("", line).strip() for block in blocks for line in block.strip().split("\n")[2:])
        return "\n".join(line for line in lines if line)

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Add the accuracies by task type and domain to those by length."""
        tasks = by_kind(outcomes, lambda outcome: detail(outcome, "task_type"))
        domains = by_kind(outcomes, lambda outcome: detail(outcome, "domain"))
        kinds = {f"task_type/{kind}": value for kind, value in tasks.items()}
        kinds |= {f"domain/{kind}": value for kind, value in domains.items()}
        return super().summary(outcomes) | {f"accuracy/{kind}": value for kind, value in kinds.items()}
