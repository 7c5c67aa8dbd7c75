"""ActivityNet-QA: questions about activities in minutes of video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmfast.eval.datasets.files import Row
from mmfast.eval.datasets.open_video import OpenVideoTask

_KINDS = ("motion", "spatial", "temporal", "yes/no", "color", "object", "location", "number", "other")


@dataclass(frozen=True)
class ActivityNetQa(OpenVideoTask):
    """ActivityNet-QA (Yu et al., 2019): 8,000 test questions on 800 videos."""

    name: ClassVar[str] = "activitynet-qa"
    paper: ClassVar[str] = "arXiv:1906.02467"
    source: ClassVar[str] = "ActivityNet-QA (MILVLG/activitynet-qa) and the videos of ActivityNet"
    layout: ClassVar[tuple[str, ...]] = ("{split}_q.json", "{split}_a.json", "videos/v_<video_name>.mp4")
    folders: ClassVar[tuple[str, ...]] = ("videos", "all_test", "")

    def video_name(self, row: Row) -> str:
        """Name the video, whose file begins with v_ though the questions may not say so."""
        return f"v_{row.text('video_name').removeprefix('v_')}"

    def kind(self, row: Row, answer: Row) -> str:
        """Name the kind of a question by the number that its answer has."""
        return _KINDS[answer.integer("type", 0, len(_KINDS) - 1)]
