"""MSRVTT-QA: what, who and how in web clips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmfast.eval.datasets.files import Row
from mmfast.eval.datasets.open_video import OpenVideoTask


@dataclass(frozen=True)
class MsrvttQa(OpenVideoTask):
    """MSRVTT-QA (Xu et al., 2017): 72,821 test questions."""

    name: ClassVar[str] = "msrvtt-qa"
    paper: ClassVar[str] = "doi:10.1145/3123266.3123427"
    source: ClassVar[str] = "MSRVTT-QA (xudejing/video-question-answering) and the videos of MSR-VTT"
    layout: ClassVar[tuple[str, ...]] = (
        "{split}_qa.json, or {split}_q.json and {split}_a.json as Video-ChatGPT has them",
        "videos/video<number>.mp4",
    )
    folders: ClassVar[tuple[str, ...]] = ("videos", "TestVideo", "all", "")

    def video_name(self, row: Row) -> str:
        """Name the clip, by its number where it has no name."""
        return row.text("video_name") if "video_name" in row.values else f"video{row.text('video_id')}"
