"""ActivityNet-QA: questions about activities in minutes of video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmfast.eval.datasets.files import Row
from mmfast.eval.datasets.open_video import OpenVideoTask, in_folders

_FOLDERS = ("videos", "all_test", "")
_KINDS = ("motion", "spatial", "temporal", "yes/no", "color", "object", "location", "number", "other")


@dataclass(frozen=True)
class ActivityNetQa(OpenVideoTask):
    """ActivityNet-QA (Yu et al., 2019): 8,000 test questions on 800 videos.

    Args:
        root: the folder.
        split: ``"test"`` or ``"val"``.
        limit: ask only so many questions, the first ones; None for all.
        scoring: ``"exact"``, ``"contains"`` or ``"judge"``.
        judge: a callable that replies to requests.
        replies: a JSONL file of replies.
    """

    name: ClassVar[str] = "activitynet-qa"
    paper: ClassVar[str] = "arXiv:1906.02467"
    splits: ClassVar[tuple[str, ...]] = ("test", "val")
    source: ClassVar[str] = "ActivityNet-QA (MILVLG/activitynet-qa) and the videos of ActivityNet"
    layout: ClassVar[tuple[str, ...]] = ("{split}_q.json", "{split}_a.json", "videos/v_<video_name>.mp4")

    split: str = "test"

    def videos(self, row: Row) -> tuple[str, ...]:
        """Name the files that the video may be."""
        return in_folders(_FOLDERS, f"v_{row.text('video_name').removeprefix('v_')}")

    def kind(self, row: Row, answer: Row) -> str:
        """Name the kind of a question by the number that its answer has."""
        return _KINDS[answer.integer("type", 0, len(_KINDS) - 1)]
