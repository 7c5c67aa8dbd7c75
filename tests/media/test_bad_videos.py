"""Damaged, mislabelled and oversized videos end in one clear line, or in what can still be decoded."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest

from mmfast.media import MediaError, read_video, sample
from mmfast.media.readers import pyav


def refusal(source, **options) -> str:
    """The message, which must be a single line."""
    with pytest.raises(MediaError) as caught:
        read_video(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_index_at_the_end_cut_off(clips, tmp_path: Path) -> None:
    data = clips.get("h264-closed-gop").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: data.index(b"moov") - 100])
    message = refusal(tmp_path / "cut.mp4")
    assert "cut.mp4: no " in message
    assert "cut off" in message


def test_index_at_the_front_gives_what_is_there(clips, tmp_path: Path) -> None:
    whole = clips.make(
        tmp_path / "whole.mp4",
        frames=clips.noisy(30),
        # The half frame at the cut could be decoded, with grey below.
        encoder="mpeg4",
        options={"g": "5", "qscale": "2"},
        container={"movflags": "+faststart"},
    )
    data = whole.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    video = read_video(tmp_path / "cut.mp4", num_frames=4)
    assert 5 <= video.total_frames <= 25
    assert f"promises 30 frames, {video.total_frames} can be decoded" in video.warnings[0]
    assert video.indices[-1] == video.total_frames - 1
    exact = read_video(whole, indices=video.indices)
    np.testing.assert_array_equal(video.frames, exact.frames)


def test_cut_between_two_frames_is_noticed(clips, tmp_path: Path) -> None:
    whole = clips.make(
        tmp_path / "whole.mp4",
        frames=clips.noisy(30),
        options={"g": "5", "bf": "0"},
        container={"movflags": "+faststart"},
    )
    with av.open(str(whole)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: ends[9]])
    video = read_video(tmp_path / "cut.mp4", num_frames=10)
    assert list(video.indices) == list(range(10))
    assert "promises 30 frames, 10 can be decoded" in video.warnings[0]


def test_reading_error_in_the_middle_keeps_the_frames_before(clips, tmp_path: Path) -> None:
    # Sample 20 claims a gigabyte. Frames that the decoder holds back for reordering must still come out.
    data = bytearray(clips.get("h264-closed-gop").read_bytes())
    struct.pack_into(">I", data, data.index(b"stsz") + 16 + 4 * 20, 0x3FFFFFFF)
    (tmp_path / "broken.mp4").write_bytes(data)
    video = read_video(tmp_path / "broken.mp4", num_frames=20)
    assert clips.numbers(video.frames)[:16] == list(range(16))
    assert (len(video), video.total_frames) == (20, 20)
    np.testing.assert_allclose(video.timestamps[:16], np.arange(16) / clips.fps, atol=1e-6)
    assert "promises 48 frames, 20 can be decoded" in video.warnings[0]


def test_frames_after_a_gap_are_counted_by_decoding(clips, tmp_path: Path) -> None:
    data = clips.get("transport-stream").read_bytes()
    packets = len(data) // 188
    (tmp_path / "gap.ts").write_bytes(data[: packets // 5 * 188] + data[packets // 4 * 188 :])
    everything = read_video(tmp_path / "gap.ts", indices=range(clips.frames))
    assert everything.total_frames < clips.frames
    assert "damaged parts" in everything.warnings[0]
    halves = read_video(tmp_path / "gap.ts", num_frames=2, sampler="midpoint")
    assert halves.total_frames == everything.total_frames


def test_damage_inside_a_frame_is_reported(clips, tmp_path: Path) -> None:
    whole = clips.make(tmp_path / "whole.mp4", frames=clips.noisy(12), options={"x264-params": "keyint=6:bframes=0"})
    data = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    start, size = packets[3]
    data[start + size // 2 : start + size] = bytes(size - size // 2)
    (tmp_path / "broken.mp4").write_bytes(data)
    video = read_video(tmp_path / "broken.mp4", indices=range(12))
    (line,) = [line for line in video.warnings if "decoded from damaged data: frames 3" in line]
    assert "broken.mp4" in line
    np.testing.assert_array_equal(video.frames[6:], read_video(whole, indices=range(6, 12)).frames)


def test_frames_that_turn_out_to_be_undecodable(clips, tmp_path: Path) -> None:
    video = read_video(clips.ends_in_nonsense(tmp_path / "broken.mp4"), num_frames=5)
    assert clips.numbers(video.frames) == list(video.indices) == [0, 11, 22, 33, 44]
    assert (video.total_frames, video.duration) == (45, 1.5)
    assert "48 frames counted, 45 can be decoded" in video.warnings[0]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"this is no video\n" * 100, "text"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"", "an empty file"),
        (bytes(range(256)) * 8, "an unknown format"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\x00\x00\x00\x1cftypheic", "HEIC"),
    ],
)
def test_other_files_named_mp4(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "clip.mp4").write_bytes(content)
    message = refusal(tmp_path / "clip.mp4")
    assert f"clip.mp4: {found}" in message
    assert "give MP4/MOV" in message


def test_files_that_point_to_other_files(clips, tmp_path: Path) -> None:
    (tmp_path / "other.ts").write_bytes(clips.get("transport-stream").read_bytes())
    script = tmp_path / "script.mp4"
    script.write_text("ffconcat version 1.0\nfile other.ts\n")
    with av.open(str(script)) as container:
        assert container.streams.video  # FFmpeg alone would follow it
    assert "text, not a video" in refusal(script)
    # Nor if it got past the first look.
    with pytest.raises(MediaError, match="no readable video"):
        pyav.open_with_pyav(script, max_pixels=1_000_000)


def test_sound_only(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert "sound.mp4: only audio; give a file with a video stream" in refusal(tmp_path / "sound.mp4")


def test_cover_of_a_sound_file_is_no_video(clips, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "song.mp4"), "w") as out:
        cover = out.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic.value
        sound = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        out.start_encoding()
        packet = av.Packet(clips.png(64, 64))
        packet.pts = packet.dts = 0
        packet.stream = cover
        out.mux(packet)
        out.mux(sound.encode(frame))
        out.mux(sound.encode())
    assert "song.mp4: only a cover picture and audio" in refusal(tmp_path / "song.mp4")


@pytest.mark.parametrize("suffix", [".mov", ".mkv", ".avi"])
def test_no_frame_at_all(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"none{suffix}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        out.start_encoding()
    message = refusal(path)
    assert any(reason in message for reason in ("no stream at all", "no readable video", "no frame can be"))


def test_frames_that_are_garbage(clips, tmp_path: Path) -> None:
    path = clips.png_clip(tmp_path / "garbage.mov", bytes(range(200)))
    assert "png video in mov" in refusal(path)
    assert "of which no frame can be decoded" in refusal(path)


@pytest.mark.parametrize("error", [av.error.OSError(95, "Operation not supported"), ValueError("unknown")])
def test_colours_that_cannot_be_converted(monkeypatch: pytest.MonkeyPatch, clips, error: Exception) -> None:
    # Which colour spaces these are differs between releases of FFmpeg.
    class Fails:
        def reformat(self, *frame: object, **options: object) -> None:
            raise error

    monkeypatch.setattr("av.video.reformatter.VideoReformatter", Fails)
    message = refusal(clips.get("mkv"))
    assert "frames of this colour space (yuv420p) cannot be converted to RGB" in message


def test_missing_file() -> None:
    assert refusal("missing.mp4") == "missing.mp4: no such file; check the path"
    assert "download it first" in refusal("https://example.org/clip.mp4")


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "a pipe or device" in refusal(tmp_path / "pipe.mp4")


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    assert "a folder without images" in refusal(tmp_path)


def test_too_many_bytes(clips) -> None:
    assert "more than max_bytes=100" in refusal(clips.get("mkv"), max_bytes=100)


def test_too_many_pixels(clips) -> None:
    message = refusal(clips.get("mkv"), max_pixels=6143)
    assert "96x64 pixels (width x height) is more than max_pixels=6143" in message
    assert len(read_video(clips.get("mkv"), num_frames=1, max_pixels=6144)) == 1


@pytest.mark.parametrize("reader", ["pyav", "decord", "torchcodec"])
@pytest.mark.parametrize(("side", "found"), [(1200, "1200x1200 pixels"), (2500, "larger than")])
def test_frames_larger_than_the_header_says(clips, tmp_path: Path, reader: str, side: int, found: str) -> None:
    path = clips.png_clip(tmp_path / "large.mov", clips.png(side, side))
    message = refusal(path, reader=reader, max_pixels=1_000_000)
    assert found in message
    assert "max_pixels=1000000" in message


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_opening_does_not_decode_huge_frames(clips, tmp_path: Path) -> None:
    # FFmpeg decodes the first frame to learn its size: 750 MB here, were it not stopped.
    path = clips.png_clip(tmp_path / "huge.mov", clips.png(16_000, 16_000, complete=False))
    code = """
import re, sys
from pathlib import Path
from mmfast.media import MediaError, read_video

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak()
try:
    read_video(sys.argv[1])
except MediaError:
    print((peak() - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150


def test_extreme_aspect_ratio(clips, tmp_path: Path) -> None:
    path = clips.make(tmp_path / "strip.mkv", "mpeg4", frames=[np.zeros((16, 1616, 3), np.uint8)])
    assert "extreme aspect ratio" in refusal(path)


def test_too_much_memory(clips) -> None:
    message = refusal(clips.get("mkv"), num_frames=10, max_memory=10 * 96 * 64 * 3 - 1)
    assert "10 frames of 96x64 pixels take 184320 bytes" in message
    assert len(read_video(clips.get("mkv"), num_frames=10, max_memory=10 * 96 * 64 * 3)) == 10


def test_full_size_frames_are_never_stacked() -> None:
    # 33 full-size frames would be 91 MB.
    read_video(sample("bigbuckbunny.mp4"), indices=[0], size=64)
    tracemalloc.start()
    try:
        read_video(sample("bigbuckbunny.mp4"), indices=range(0, 66, 2), size=64)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["h264-open-gop", "vp9", "avi-b-frames", "transport-stream"])
def test_no_damage_crashes_the_reader(clips, tmp_path: Path, name: str) -> None:
    source = clips.get(name)
    data, refusals, videos = source.read_bytes(), [], []
    for seed in range(40):
        path = tmp_path / f"{seed}{source.suffix}"
        path.write_bytes(clips.damaged(data, seed))
        try:
            videos.append(read_video(path, num_frames=5, max_pixels=1_000_000))
        except MediaError as error:
            refusals.append(str(error))
    assert all(len(video) == len(video.indices) == len(video.timestamps) >= 1 for video in videos)
    assert not any("\n" in message for message in refusals)
    assert len(videos) > 5
