"""torchcodec is optional: what it raises leads to PyAV, what it returns is used."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mmfast.media import MediaError, read_video


class StandIn:
    """The part of ``torchcodec.decoders.VideoDecoder`` that is used, over PyAV."""

    def __init__(self, path: str, seek_mode: str, dimension_order: str) -> None:
        assert (seek_mode, dimension_order) == ("exact", "NHWC")
        self.video = read_video(path, indices=range(48))
        self.metadata = SimpleNamespace(num_frames=48, average_fps=30.0)

    def get_frame_at(self, index: int) -> SimpleNamespace:
        # Its times start at the container's start time.
        return SimpleNamespace(
            data=torch.from_numpy(self.video.frames[index]), pts_seconds=5.0 + self.video.timestamps[index]
        )


def install(monkeypatch: pytest.MonkeyPatch, decoder: object) -> None:
    package, module = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    module.VideoDecoder = decoder
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)


def test_its_frames_are_used(clips, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn)
    video = read_video(clips.get("h264-closed-gop"), indices=[40, 2, 60], size=48, reader="torchcodec")
    assert clips.numbers(video.frames) == [40, 2, 47]
    assert video.reader == "torchcodec"
    assert video.timestamps == pytest.approx((40 / 30, 2 / 30, 47 / 30))
    assert video.warnings == ("the last frame is 47; it stands for 60",)


def test_absence_leads_to_pyav(clips, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    video = read_video(clips.get("mkv"), num_frames=4, reader="torchcodec")
    assert clips.numbers(video.frames) == list(video.indices)
    assert video.reader == "pyav"
    assert video.warnings[0].startswith("torchcodec failed (ModuleNotFoundError: ")


def test_failure_while_reading_leads_to_pyav(clips, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(StandIn):
        def get_frame_at(self, index: int) -> SimpleNamespace:
            if index == 31:
                raise RuntimeError("Could not push packet\nto decoder")
            return super().get_frame_at(index)

    install(monkeypatch, Breaks)
    video = read_video(clips.get("mkv"), num_frames=4, reader="torchcodec")
    assert video.reader == "pyav"
    assert video.warnings[0] == ("torchcodec failed (RuntimeError: Could not push packet to decoder); read with pyav")


@pytest.mark.parametrize("name", ["avi-h264", "transport-stream"])
def test_containers_it_gets_wrong_go_to_pyav(clips, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(monkeypatch, StandIn)
    video = read_video(clips.get(name), num_frames=4, reader="torchcodec")
    assert video.reader == "pyav"
    assert "torchcodec returns wrong frames for" in video.warnings[0]


def test_bad_files_are_still_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("text")
    with pytest.raises(MediaError, match="text, not a video"):
        read_video(tmp_path / "clip.mp4", reader="torchcodec")
