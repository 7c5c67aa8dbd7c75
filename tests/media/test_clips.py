"""Long videos, clip after clip."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mmfast.media import MediaError, prefetched, read_video, sample, video_clips
from mmfast.media.readers import pyav


def test_every_frame_once(clips, clip_name: str) -> None:
    whole = read_video(clips.get(clip_name), indices=range(48))
    found = list(video_clips(clips.get(clip_name), clip_frames=20))
    assert [len(clip) for clip in found] == [20, 20, 8]
    assert tuple(index for clip in found for index in clip.indices) == whole.indices
    assert tuple(time for clip in found for time in clip.timestamps) == whole.timestamps
    np.testing.assert_array_equal(np.concatenate([clip.frames for clip in found]), whole.frames)
    assert {(clip.total_frames, clip.fps, clip.duration, clip.reader) for clip in found} == {
        (48, whole.fps, whole.duration, "pyav")
    }


def test_rate_and_size(clips) -> None:
    found = list(video_clips(clips.get("h264-open-gop"), clip_frames=3, fps=5.0, size=48))
    assert [clip.indices for clip in found] == [(0, 6, 12), (18, 24, 30), (36, 42)]
    assert clips.numbers(found[1].frames) == [18, 24, 30]
    assert found[1].frames.shape == (3, 32, 48, 3)
    assert found[1].timestamps == pytest.approx((0.6, 0.8, 1.0))
    assert {clip.sampler for clip in found} == {"stride"}


def test_rate_above_that_of_the_file_gives_all(clips) -> None:
    assert sum(len(clip) for clip in video_clips(clips.get("mkv"), fps=500.0)) == 48


def test_folders_and_arrays(clips, tmp_path: Path) -> None:
    frames = np.stack([clips.numbered(n) for n in range(7)])
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    for source in (frames, tmp_path):
        found = list(video_clips(source, clip_frames=3, source_fps=2.0))
        assert [clips.numbers(clip.frames) for clip in found] == [[0, 1, 2], [3, 4, 5], [6]]
        assert found[-1].timestamps == (3.0,)


def test_clips_are_decoded_when_asked_for(clips, monkeypatch: pytest.MonkeyPatch) -> None:
    shaped: list[int] = []
    original = pyav.Shaper.__call__
    monkeypatch.setattr(pyav.Shaper, "__call__", lambda self, frame: shaped.append(frame.pts) or original(self, frame))
    found = video_clips(clips.get("mkv"), clip_frames=5)
    # Opening looks at the first frame; a clip is handed on when the frame after it is there.
    assert len(shaped) == 1
    next(found)
    assert len(shaped) == 1 + 5 + 1


def test_recordings_that_were_joined(clips, tmp_path: Path) -> None:
    data = clips.get("transport-stream").read_bytes()
    (tmp_path / "both.ts").write_bytes(data + data)
    whole = read_video(tmp_path / "both.ts", indices=range(96))
    found = list(video_clips(tmp_path / "both.ts", clip_frames=24))
    assert tuple(time for clip in found for time in clip.timestamps) == whole.timestamps
    assert all(first < second for first, second in zip(whole.timestamps, whole.timestamps[1:], strict=False))
    assert found[0].warnings
    assert [clip.warnings for clip in found[1:]] == [()] * (len(found) - 1)


def test_frames_that_turn_out_to_be_undecodable(clips, tmp_path: Path) -> None:
    broken = clips.ends_in_nonsense(tmp_path / "broken.mp4")
    found = list(video_clips(broken, clip_frames=9))
    assert [number for clip in found for number in clips.numbers(clip.frames)] == list(range(45))
    assert "48 frames counted, 45 can be decoded" in found[-1].warnings[-1]
    assert found[-1].total_frames == 45


def test_errors_come_with_the_call(clips, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("text")
    with pytest.raises(MediaError, match="text, not a video"):
        video_clips(tmp_path / "clip.mp4")
    with pytest.raises(MediaError, match="more than max_bytes=100"):
        video_clips(clips.get("mkv"), max_bytes=100)
    with pytest.raises(MediaError, match=r"4 frames of 96x64 pixels take 73728 bytes, more than max_memory=73727"):
        video_clips(clips.get("mkv"), clip_frames=4, max_memory=73727)
    assert len(next(video_clips(clips.get("mkv"), clip_frames=4, max_memory=73728))) == 4
    with pytest.raises(MediaError, match=r"96x64 pixels .* more than max_pixels=6143"):
        video_clips(clips.get("mkv"), max_pixels=6143)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"clip_frames": 0}, MediaError, "clip_frames=0"),
        ({"clip_frames": 2.0}, TypeError, "clip_frames=2.0"),
        ({"clip_frames": True}, TypeError, "clip_frames=True"),
        ({"fps": 0}, MediaError, "fps=0"),
        ({"fps": "1"}, TypeError, "fps='1'"),
        ({"size": 0}, MediaError, "size=0"),
    ],
)
def test_wrong_arguments(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        video_clips(sample("bigbuckbunny.mp4"), **arguments)


def test_decoding_ahead(clips) -> None:
    with prefetched(video_clips(clips.get("hevc"), clip_frames=7), lambda clip: clip) as ready:
        assert [number for clip in ready for number in clips.numbers(clip.frames)] == list(range(48))
    with prefetched(video_clips(clips.get("hevc"), clip_frames=1), len) as ready:
        next(ready)
    assert all(not thread.name.startswith("mmfast") for thread in threading.enumerate())


MEASURED = """
import re, sys
from pathlib import Path
from mmfast.media import prefetched, read_video, video_clips

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

read_video(sys.argv[1], num_frames=2)
before = peak()
frames = 0
if sys.argv[2] == "clips":
    with prefetched(video_clips(sys.argv[1], clip_frames=64), lambda clip: clip) as clips:
        frames = sum(len(clip) for clip in clips)
else:
    frames = len(read_video(sys.argv[1], num_frames=512))
print(frames, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize(("way", "frames", "megabytes"), [("clips", 36_000, 40), ("512 frames", 512, 60)])
def test_an_hour_in_bounded_memory(clips, tmp_path: Path, way: str, frames: int, megabytes: int) -> None:
    # All frames of the hour would be 664 MB.
    minute = clips.make(
        tmp_path / "minute.mp4", frames=[clips.numbered(n % 256) for n in range(600)], options={"g": "50"}, rate=10
    )
    hour = repeated(minute, tmp_path / "hour.mp4", 60)
    done = subprocess.run([sys.executable, "-c", MEASURED, str(hour), way], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[0]) == frames
    assert int(done.stdout.split()[1]) < megabytes


def repeated(source: Path, target: Path, times: int) -> Path:
    """Write the same recording several times, one after the other."""
    with av.open(str(target), "w") as after:
        copy = None
        shift = 0
        for _ in range(times):
            with av.open(str(source)) as before:
                stream = before.streams.video[0]
                copy = copy or after.add_stream_from_template(stream)
                for packet in before.demux(stream):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = copy
                        after.mux(packet)
                shift += stream.duration
    return target
