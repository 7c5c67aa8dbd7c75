"""MSVD-QA: what, who and how in short clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from mmfast.eval.datasets.files import Row
from mmfast.eval.datasets.open_video import OpenVideoTask


@dataclass(frozen=True)
class MsvdQa(OpenVideoTask):
    """MSVD-QA (Xu et al., 2017): 13,157 test questions."""

    name: ClassVar[str] = "msvd-qa"
    paper: ClassVar[str] = "doi:10.1145/3123266.3123427"
    source: ClassVar[str] = "MSVD-QA (xudejing/video-question-answering) and the YouTubeClips of MSVD"
    layout: ClassVar[tuple[str, ...]] = (
        "{split}_q.json and {split}_a.json as Video-ChatGPT has them, or {split}_qa.json and youtube_mapping.txt",
        "videos/<name>.avi",
    )
    folders: ClassVar[tuple[str, ...]] = ("videos", "YouTubeClips", "")

    def video_name(self, row: Row) -> str:
        """Name the clip, by the mapping where only its number is given."""
        if "video_name" in row.values:
            return row.text("video_name")
        number = f"vid{row.text('video_id')}"
        return self._clips.get(number, number)

    @cached_property
    def _clips(self) -> Mapping[str, str]:
        """Clip names by number, as the mapping file pairs them."""
        path = self.find("youtube_mapping.txt")
        if path is None:
            return {}
        lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
        return {pair[1]: pair[0] for pair in lines if len(pair) == 2}
