"""MSRVTT-QA: what, who and how in web clips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmfast.eval.datasets.files import Row
from mmfast.eval.datasets.open_video import OpenVideoTask, in_folders

_FOLDERS = ("videos", "TestVideo", "all", "")


@dataclass(frozen=True)
class MsrvttQa(OpenVideoTask):
    """MSRVTT-QA (Xu et al., 2017): 72,821 test questions.

    Args:
        root: the folder.
        split: ``"test"`` or ``"val"``.
        limit: ask only so many questions, the first ones; None for all.
        scoring: ``"exact"``, ``"contains"`` or ``"judge"``.
        judge: a callable that replies to requests.
        replies: a JSONL file of replies.
    """

    name: ClassVar[str] = "msrvtt-qa"
    paper: ClassVar[str] = "doi:10.1145/3123266.3123427"
    splits: ClassVar[tuple[str, ...]] = ("test", "val")
    source: ClassVar[str] = "MSRVTT-QA (xudejing/video-question-answering) and the videos of MSR-VTT"
    layout: ClassVar[tuple[str, ...]] = (
        "{split}_qa.json, or {split}_q.json and {split}_a.json as Video-ChatGPT has them",
        "videos/video<number>.mp4",
    )

    split: str = "test"

    def videos(self, row: Row) -> tuple[str, ...]:
        """Name the files that the clip may be."""
        named = "video_name" in row.values
        return in_folders(_FOLDERS, row.text("video_name") if named else f"video{row.text('video_id')}")
