"""Every frame asked for is that very frame, in every kind of file."""

from __future__ import annotations

import random
from pathlib import Path

import av
import numpy as np
import pytest

from mmfast.media import MediaError, read_video
from mmfast.media.readers import pyav


def test_all_frames_in_random_order(clips, clip_name: str) -> None:
    order = random.Random(0).sample(range(clips.frames), clips.frames)
    video = read_video(clips.get(clip_name), indices=order)
    assert clips.numbers(video.frames) == order == list(video.indices)
    assert video.total_frames == clips.frames
    assert video.warnings == ()
    assert video.reader == "pyav"


def test_sampled_frames_and_their_times(clips, clip_name: str) -> None:
    video = read_video(clips.get(clip_name), num_frames=16)
    assert clips.numbers(video.frames) == list(video.indices)
    assert len(video) == 16
    expected = [clips.milliseconds(clip_name, index) / 1000 for index in video.indices]
    # Matroska and WEBM round times to milliseconds.
    np.testing.assert_allclose(video.timestamps, expected, rtol=0, atol=0.0011)


def test_rate_and_duration(clips) -> None:
    video = read_video(clips.get("h264-closed-gop"), num_frames=1)
    assert (video.fps, video.duration) == (30.0, clips.frames / 30)
    uneven = read_video(clips.get("variable-rate"), num_frames=1)
    assert uneven.fps == pytest.approx(1000 * clips.frames / (20 * 48 + 77 * 4), rel=0.02)


def test_impossible_rate_is_not_believed(clips, tmp_path: Path) -> None:
    # A clock of 90,000 ticks per second taken for the frame rate.
    path = clips.make(tmp_path / "clock.mp4", rate=90_000, frames=5)
    video = read_video(path, num_frames=5)
    assert (video.fps, clips.numbers(video.frames)) == (24.0, [0, 1, 2, 3, 4])
    assert "no frame rate in the file; 24 per second assumed" in video.warnings[0]


def test_frames_that_change_size_come_back_in_one(clips, tmp_path: Path) -> None:
    larger = [np.kron(clips.numbered(n), np.ones((2, 2, 1), np.uint8)) for n in range(48, 60)]
    second = clips.make(tmp_path / "second.ts", frames=larger)
    (tmp_path / "both.ts").write_bytes(clips.get("transport-stream").read_bytes() + second.read_bytes())
    video = read_video(tmp_path / "both.ts", indices=range(60), max_pixels=192 * 128)
    assert video.frames.shape == (60, 64, 96, 3)
    assert clips.numbers(video.frames) == list(range(60))
    # The second recording's clock starts again.
    np.testing.assert_allclose(video.timestamps, np.arange(60) / clips.fps, atol=1e-6)
    assert "damaged parts" in video.warnings[0]
    with pytest.raises(MediaError, match=r"192x128 pixels .* more than max_pixels=24575"):
        read_video(tmp_path / "both.ts", indices=range(60), max_pixels=192 * 128 - 1)


def test_rate_sampling_uses_the_rate_of_the_file(clips) -> None:
    video = read_video(clips.get("h264-closed-gop"), fps=5.0)
    assert video.sampler == "fps"
    assert list(video.indices) == [0, 7, 13, 20, 27, 34, 40, 47]
    assert clips.numbers(video.frames) == list(video.indices)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_display_rotation_is_applied(clips, tmp_path: Path, degrees: int) -> None:
    source = clips.get("h264-closed-gop")
    plain = read_video(source, indices=[0, 9])
    turned = read_video(clips.rotated(source, tmp_path / "turned.mp4", degrees), indices=[0, 9])
    # np.rot90 turns counter-clockwise.
    np.testing.assert_array_equal(turned.frames, np.rot90(plain.frames, -degrees // 90, axes=(1, 2)))


def test_rotated_frames_are_resized_after_turning(clips, tmp_path: Path) -> None:
    path = clips.rotated(clips.get("h264-closed-gop"), tmp_path / "turned.mp4", 90)
    assert read_video(path, num_frames=2, size=48).frames.shape == (2, 48, 32, 3)


def test_edit_list_hides_frames(clips, tmp_path: Path) -> None:
    # A cut without re-encoding: packets from keyframe 12 on, display from frame 18 on.
    source = clips.make(tmp_path / "long.mp4", options={"g": "12", "bf": "0"})
    with av.open(str(source)) as before, av.open(str(tmp_path / "cut.mp4"), "w") as after:
        stream = before.streams.video[0]
        copy = after.add_stream_from_template(stream)
        for packet in before.demux(stream):
            if packet.size and packet.pts * packet.time_base * clips.fps >= 12:
                packet.pts -= round(18 / clips.fps / packet.time_base)
                packet.dts = packet.pts
                packet.stream = copy
                after.mux(packet)
    video = read_video(tmp_path / "cut.mp4", indices=range(30))
    assert clips.numbers(video.frames) == list(range(18, 48))
    assert (video.total_frames, video.warnings) == (30, ())
    # The middle of two halves shows whether frames were counted right without reading to the end.
    assert read_video(tmp_path / "cut.mp4", num_frames=2, sampler="midpoint").total_frames == 30


def test_hidden_frames_are_not_counted(clips, tmp_path: Path) -> None:
    # The fifth bit of a VP8 frame says whether it is shown.
    hidden = (10, 20)
    with av.open(str(clips.get("vp8"))) as before, av.open(str(tmp_path / "hidden.webm"), "w") as after:
        stream = before.streams.video[0]
        copy = after.add_stream_from_template(stream)
        for number, packet in enumerate(before.demux(stream)):
            if packet.size:
                data = bytearray(bytes(packet))
                data[0] &= 0xEF if number in hidden else 0xFF
                shown = av.Packet(bytes(data))
                shown.pts, shown.dts, shown.time_base = packet.pts, packet.dts, packet.time_base
                shown.is_keyframe, shown.stream = packet.is_keyframe, copy
                after.mux(shown)
    video = read_video(tmp_path / "hidden.webm", indices=range(clips.frames - 2))
    assert clips.numbers(video.frames) == [n for n in range(clips.frames) if n not in hidden]
    assert (video.total_frames, video.warnings) == (clips.frames - 2, ())
    middle = read_video(tmp_path / "hidden.webm", num_frames=2, sampler="midpoint")
    assert middle.total_frames == clips.frames - 2


def test_recording_that_starts_between_keyframes(clips, tmp_path: Path) -> None:
    data = clips.get("transport-stream").read_bytes()
    start = len(data) // 3 // 188 * 188
    (tmp_path / "middle.ts").write_bytes(data[start:])
    everything = read_video(tmp_path / "middle.ts", indices=range(clips.frames))
    total = everything.total_frames
    assert 10 < total < clips.frames
    first = clips.number(everything.frames[0])
    assert clips.numbers(everything.frames[:total]) == list(range(first, first + total))
    assert first + total == clips.frames
    assert read_video(tmp_path / "middle.ts", num_frames=4).indices[-1] == total - 1
    assert read_video(tmp_path / "middle.ts", num_frames=2, sampler="midpoint").total_frames == total


def test_counting_stops_after_the_last_wanted_frame(clips, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, converted = [], []
    frames, shaped = pyav.Decoding.frames, pyav.Shaper.__call__

    def counted(self):
        for frame in frames(self):
            decoded.append(frame.pts)
            yield frame

    clip = pyav.open_with_pyav(clips.get("transport-stream"), max_pixels=10_000)
    assert clip.index is None
    monkeypatch.setattr(pyav.Decoding, "frames", counted)
    monkeypatch.setattr(pyav.Shaper, "__call__", lambda self, frame: converted.append(frame.pts) or shaped(self, frame))
    clip.read([3, 9], clips.height, clips.width)
    assert (len(decoded), len(converted)) == (10, 2)
