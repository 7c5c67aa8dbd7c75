"""Seeking gives, bit for bit, what decoding from the beginning gives, or is given up."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from mmfast.media import read_video
from mmfast.media.readers import pyav
from mmfast.media.readers.index import Group, Index, PacketTable
from mmfast.media.readers.pyav import PyavClip, open_with_pyav

HEIGHT, WIDTH, FRAMES = 64, 96, 75
LIMIT = 1_000_000
X264 = "keyint=15:scenecut=0:bframes=3:"
X265 = "keyint=15:log-level=none:pools=1"

# name: (suffix, encoder, options, keyframes that can be started from)
MOVING = {
    "open-gop-pyramid": (
        ".mp4",
        "libx264",
        {"x264-params": "keyint=15:scenecut=0:open-gop=1:bframes=8:b-adapt=0:ref=8"},
        5,
    ),
    "open-gop-mkv": (".mkv", "libx264", {"x264-params": X264 + "open-gop=1"}, 5),
    "interlaced": (".mp4", "libx264", {"x264-params": X264 + "open-gop=1:interlaced=1"}, 5),
    # Each column of blocks is renewed in turn: its "keyframes" are no place to start.
    "intra-refresh": (".mp4", "libx264", {"x264-params": "keyint=15:intra-refresh=1:bframes=0"}, 1),
    "one-keyframe": (".mp4", "libx264", {"x264-params": "keyint=infinite:bframes=3"}, 1),
    "ultrafast": (".mov", "libx264", {"preset": "ultrafast", "g": "15"}, 5),
    "hard-cuts": (".mp4", "libx264", {"x264-params": "keyint=250:min-keyint=1:bframes=3"}, 3),
    "hevc-layers": (".mkv", "libx265", {"x265-params": X265 + ":bframes=4:temporal-layers=1", "preset": "fast"}, 5),
    "vp9-hidden-references": (".webm", "libvpx-vp9", {"cpu-used": "8", "g": "15", "lag-in-frames": "10"}, 5),
    "av1": (".mp4", "libsvtav1", {"preset": "12", "g": "15", "svtav1-params": "lp=1"}, 5),
    "mpeg4": (".mp4", "mpeg4", {"g": "15", "bf": "2", "qscale": "3", "sc_threshold": "1000000000"}, 6),
    "mjpeg": (".mov", "mjpeg", {"qscale": "3", "strict": "-1"}, FRAMES),
}


@pytest.fixture(scope="module")
def moving() -> list[np.ndarray]:
    """A window that wanders over a picture, with a little noise; two hard cuts."""
    chance = np.random.default_rng(0)
    ground = np.kron(chance.integers(0, 256, (30, 40, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    frames = []
    for n in range(FRAMES):
        top, left = int(40 + 30 * np.sin(n / 7)) + 40 * (n // 30), int(60 + 50 * np.cos(n / 9))
        window = ground[top : top + HEIGHT, left : left + WIDTH].astype(int)
        shade = 255 - window if n // 30 == 1 else window
        frames.append(np.clip(shade + chance.integers(-4, 5, shade.shape), 0, 255).astype(np.uint8))
    return frames


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were decoded from the beginning, filled as it happens."""
    found: list[Path] = []
    original = PyavClip._from_the_beginning

    def noted(self: PyavClip, *options):
        found.append(self.path)
        return original(self, *options)

    monkeypatch.setattr(PyavClip, "_from_the_beginning", noted)
    return found


def decoded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All frames and their times, as FFmpeg gives them one after the other."""
    with av.open(str(path)) as container:
        frames = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)]
    return np.stack([frame for frame, _ in frames]), np.array([time for _, time in frames])


def choices(total: int) -> list[list[int]]:
    """Single frames, pairs, and many."""
    chance = random.Random(1)
    singles = [[n] for n in chance.sample(range(total), min(25, total))]
    return singles + [sorted(chance.sample(range(total), min(count, total))) for count in (2, 3, 8, 40)]


def same_everywhere(clip: PyavClip, frames: np.ndarray, times: np.ndarray) -> None:
    assert clip.info.total_frames == len(frames)
    for numbers in choices(len(frames)):
        got = clip.read(numbers, *frames.shape[1:3])
        np.testing.assert_array_equal(got.frames, frames[numbers])
        assert got.timestamps == tuple(times[numbers] - times[0])
        assert got.warnings == ()


@pytest.mark.parametrize("name", MOVING)
def test_seeking_is_exact(clips, moving, tmp_path: Path, restarts: list[Path], name: str) -> None:
    suffix, encoder, options, starts = MOVING[name]
    pixels = {"mjpeg": "yuvj420p"}.get(encoder, "yuv420p")
    path = clips.make(tmp_path / f"moving{suffix}", encoder, options, frames=moving, pixels=pixels)
    clip = open_with_pyav(path, max_pixels=LIMIT)
    assert clip.index is not None
    assert len(clip.index.start_place) == starts
    same_everywhere(clip, *decoded(path))
    assert restarts == []


def test_every_kind_of_clip(clips, clip_name: str, restarts: list[Path]) -> None:
    clip = open_with_pyav(clips.get(clip_name), max_pixels=LIMIT)
    frames, times = decoded(clips.get(clip_name))
    if clip_name.startswith("avi"):
        times = np.arange(len(frames)) / clip.info.fps
    same_everywhere(clip, frames, times)
    assert (clip.index is None) == (restarts != []) == (clip_name.startswith(("avi", "transport", "vp8")))


@pytest.mark.parametrize(("height", "width"), [(144, 176), (160, 90), (1080, 1920)])
def test_sizes(clips, tmp_path: Path, restarts: list[Path], height: int, width: int) -> None:
    chance = np.random.default_rng(0)
    pictures = [
        np.kron(chance.integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8), np.ones((2, 2, 1), np.uint8))
        for _ in range(8)
    ]
    path = clips.make(tmp_path / "clip.mp4", options={"preset": "ultrafast", "g": "4"}, frames=pictures)
    frames, times = decoded(path)
    video = read_video(path, indices=[7, 0])
    np.testing.assert_array_equal(video.frames, frames[[7, 0]])
    assert video.timestamps == (times[7] - times[0], 0.0)
    assert restarts == []


@pytest.mark.parametrize(
    ("suffix", "encoder"), [(".mp4", "libx264"), (".mkv", "libx265"), (".webm", "libvpx"), (".ts", "libx264")]
)
def test_one_frame(clips, tmp_path: Path, suffix: str, encoder: str) -> None:
    path = clips.make(tmp_path / f"one{suffix}", encoder, frames=[clips.numbered(5)])
    video = read_video(path)
    np.testing.assert_array_equal(video.frames, decoded(path)[0])
    assert (video.total_frames, video.timestamps) == (1, (0.0,))
    assert video.warnings == ()


def test_turned_frames(clips, moving, tmp_path: Path, restarts: list[Path]) -> None:
    path = clips.make(tmp_path / "plain.mp4", options={"x264-params": X264}, frames=moving)
    turned = clips.rotated(path, tmp_path / "turned.mp4", 90)
    clip = open_with_pyav(turned, max_pixels=LIMIT)
    frames, times = decoded(path)
    same_everywhere(clip, np.rot90(frames, -1, axes=(1, 2)), times)
    assert restarts == []


def test_negative_times(clips, moving, tmp_path: Path, restarts: list[Path]) -> None:
    path = clips.make(
        tmp_path / "early.mp4",
        options={"x264-params": X264},
        frames=moving,
        clock=lambda n: 40 * n - 1000,
    )
    same_everywhere(open_with_pyav(path, max_pixels=LIMIT), *decoded(path))
    assert restarts == []


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_packets_that_are_called_keyframes_and_are_none(
    clips, moving, tmp_path: Path, restarts: list[Path], encoder: str
) -> None:
    honest = clips.make(tmp_path / "honest.mp4", encoder, {"g": "25", "bf": "0"}, frames=moving)

    def lie(packet: av.Packet) -> None:
        packet.is_keyframe = True

    path = copied(honest, tmp_path / "lies.mp4", lie)
    clip = open_with_pyav(path, max_pixels=LIMIT)
    same_everywhere(clip, *decoded(path))
    # The bits of H.264 are looked at beforehand; of the others the decoder tells.
    assert (restarts == []) == (encoder == "libx264")


def test_wrong_index_is_noticed(clips, moving, tmp_path: Path, restarts: list[Path]) -> None:
    path = clips.make(tmp_path / "clip.mp4", options={"x264-params": X264}, frames=moving)
    clip = open_with_pyav(path, max_pixels=LIMIT)
    pts = clip.index.pts.copy()
    pts[40] += 1
    wrong = replace(clip, index=replace(clip.index, pts=pts))
    frames, _ = decoded(path)
    numbers = [2, 20, 40, 41, 70]
    np.testing.assert_array_equal(wrong.read(numbers, HEIGHT, WIDTH).frames, frames[numbers])
    assert len(restarts) == 1
    together = np.concatenate([part.frames for part in wrong.parts(numbers, HEIGHT, WIDTH, 2)])
    np.testing.assert_array_equal(together, frames[numbers])
    assert len(restarts) == 2


def test_frames_that_were_read_before_giving_up_do_not_count(clips, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pyav, "_cores", lambda: 3)
    whole = clips.make(tmp_path / "whole.mp4", options={"g": "12", "bf": "0"})
    data = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for start, size in packets[20:30]:
        data[start : start + size] = b"\xff" * size
    (tmp_path / "broken.mp4").write_bytes(data)
    clip = open_with_pyav(tmp_path / "broken.mp4", max_pixels=LIMIT)
    assert clip.info.total_frames == 48
    found = clip.read([0, 29, 47], clips.height, clips.width)
    counted = replace(clip, index=None).read([0, 29, 47], clips.height, clips.width)
    assert clips.numbers(found.frames) == clips.numbers(counted.frames)
    assert clips.numbers(found.frames)[0] == 0
    assert (found.total_frames, found.timestamps) == (counted.total_frames, counted.timestamps)
    assert found.total_frames < 48


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_groups_are_decoded_side_by_side(clips, moving, tmp_path: Path, monkeypatch, cores: int) -> None:
    path = clips.make(tmp_path / "clip.mp4", options={"x264-params": X264}, frames=moving)
    clip = open_with_pyav(path, max_pixels=LIMIT)
    numbers = [0, 15, 30, 45, 60]
    names: set[str] = set()
    rendezvous = threading.Barrier(cores)
    original = pyav.opened

    def opened(*options):
        names.add(threading.current_thread().name)
        # Passes only if all threads are there at once.
        rendezvous.wait(timeout=30)
        return original(*options)

    monkeypatch.setattr(pyav, "_cores", lambda: cores)
    monkeypatch.setattr(pyav, "opened", opened)
    got = clip.read(numbers, HEIGHT, WIDTH)
    np.testing.assert_array_equal(got.frames, decoded(path)[0][numbers])
    assert len(names) == cores
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mmfast-video")]


def test_large_frames_are_decoded_by_fewer_threads(clips, moving, tmp_path: Path, monkeypatch) -> None:
    path = clips.make(tmp_path / "clip.mp4", options={"x264-params": X264}, frames=moving)
    clip = open_with_pyav(path, max_pixels=LIMIT)
    used: list[int] = []
    original = pyav.video_stream
    monkeypatch.setattr(pyav, "_cores", lambda: 16)
    monkeypatch.setattr(pyav, "_PIXELS_AT_WORK", 2 * HEIGHT * WIDTH)
    monkeypatch.setattr(pyav, "video_stream", lambda *options: used.append(options[-1]) or original(*options))
    numbers = [0, 15, 30, 45, 60]
    np.testing.assert_array_equal(clip.read(numbers, HEIGHT, WIDTH).frames, decoded(path)[0][numbers])
    # Two at once, and each of them with its half of the cores.
    assert used == [8, 8]


def index_of(starts: list[tuple[int, int]], places: list[int]) -> Index:
    """Frames shown one after the other at times 0, 10, 20, ... from packets at ``places``."""
    place, pts = np.array(starts).T
    return Index(10 * np.arange(len(places)), np.array(places), place, pts, pts, says_unused=False)


def test_frames_are_sorted_by_keyframe() -> None:
    index = index_of([(0, 0), (50, 500), (100, 1000)], list(range(150)))
    groups = index.groups([3, 49, 50, 99, 120])
    # Frame 49 lies just before a keyframe: its group reads on into the next one, which ends just before the third.
    assert [list(group.wanted.values()) for group in groups] == [[3, 49, 50, 99, 120]]
    assert index.groups([3, 20, 80, 120]) == [
        Group(0, 0, {30: 3, 200: 20}),
        Group(500, 500, {800: 80}),
        Group(1000, 1000, {1200: 120}),
    ]
    assert list(index.tail()) == list(range(100, 150))


@pytest.mark.parametrize(
    ("fault", "usable"),
    [
        ({}, True),
        ({"pts": 10}, False),
        ({"pts": None}, False),
        ({"pts": -10}, False),
        ({"is_discard": True}, True),
        ({"pts": 10, "is_discard": True}, True),
        ({"is_keyframe": True}, True),
        ({"is_keyframe": True, "pts": 0, "is_discard": True}, False),
    ],
)
def test_times_must_tell_frames_apart(fault: dict, usable: bool) -> None:
    table = PacketTable("mpeg4", b"")
    for n in range(6):
        packet = {"pts": 10 * n, "dts": 10 * n - 20, "is_keyframe": n == 0, "is_discard": False}
        table.add(SimpleNamespace(**packet | (fault if n == 3 else {})))
    assert (table.index("mov,mp4,m4a", 0) is not None) == usable
    assert table.index("mov,mp4,m4a", 10) is None
    assert table.index("avi", 0) is None


def test_frames_shown_before_their_keyframe_start_at_the_one_before() -> None:
    # The keyframe at place 20 is shown as frame 22; frames 20 and 21 follow it in the file.
    places = [*range(20), 21, 22, 20, *range(23, 40)]
    index = index_of([(0, 0), (20, 220)], places)
    assert index.groups([21]) == [Group(0, 0, {210: 21})]
    assert index.groups([22]) == [Group(220, 220, {220: 22})]


@pytest.mark.parametrize(
    "name", ["h264-closed-gop", "h264-open-gop", "mkv", "hevc", "avi-b-frames", "transport-stream"]
)
def test_parts_are_what_is_read_at_once(clips, name: str) -> None:
    clip = open_with_pyav(clips.get(name), max_pixels=LIMIT)
    numbers = list(range(1, 48, 3))
    whole = clip.read(numbers, 32, 48)
    parts = list(clip.parts(numbers, 32, 48, 5))
    assert [len(part.frames) for part in parts] == [5, 5, 5, 1]
    np.testing.assert_array_equal(np.concatenate([part.frames for part in parts]), whole.frames)
    assert tuple(time for part in parts for time in part.timestamps) == whole.timestamps


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("options", ["open-gop=0", "open-gop=1"])
def test_files_that_are_cut_off(clips, moving, tmp_path: Path, monkeypatch, suffix: str, options: str) -> None:
    whole = clips.make(
        tmp_path / f"whole{suffix}",
        options={"x264-params": X264 + options},
        frames=moving,
        container={"movflags": "+faststart"} if suffix == ".mp4" else None,
    )
    data, counted = whole.read_bytes(), []
    count = pyav._count_by_decoding
    monkeypatch.setattr(pyav, "_count_by_decoding", lambda *options: counted.append(options) or count(*options))
    for share in (0.3, 0.55, 0.8, 0.97):
        path = tmp_path / f"cut-{share}{suffix}"
        path.write_bytes(data[: int(share * len(data))])
        clip = open_with_pyav(path, max_pixels=LIMIT)
        total = clip.info.total_frames
        assert total == count(path, LIMIT)[0]
        numbers = sorted({0, total // 2, total - 2, total - 1})
        found = clip.read(numbers, HEIGHT, WIDTH)
        one_by_one = replace(clip, index=None).read(numbers, HEIGHT, WIDTH)
        np.testing.assert_array_equal(found.frames, one_by_one.frames)
        assert (found.timestamps, found.total_frames) == (one_by_one.timestamps, total)
        if suffix == ".mp4":
            assert f"promises {FRAMES} frames, {total} can be decoded" in clip.info.warnings[0]
    # An MP4 says where its packets are: only the end has to be decoded to know how many frames there are.
    assert suffix != ".mp4" or counted == []


def test_damage_in_the_middle_is_no_cut(clips, moving, tmp_path: Path) -> None:
    # Between two pieces of sound, one picture claims to be larger than the file; those after the next piece are whole.
    with av.open(str(tmp_path / "whole.mp4"), "w") as out:
        picture = out.add_stream("libx264", rate=30, options={"g": "5", "bf": "0"})
        picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = out.add_stream("aac", rate=16000)
        for n, pixels in enumerate(moving):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = n
            out.mux(picture.encode(frame))
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            noise.rate, noise.pts = 16000, 1024 * n
            out.mux(sound.encode(noise))
        out.mux(picture.encode())
        out.mux(sound.encode())
    data = bytearray((tmp_path / "whole.mp4").read_bytes())
    struct.pack_into(">I", data, data.index(b"stsz") + 16 + 4 * 40, len(data))
    (tmp_path / "broken.mp4").write_bytes(data)
    clip = open_with_pyav(tmp_path / "broken.mp4", max_pixels=LIMIT)
    assert clip.index is None
    assert "can be decoded: cut off or damaged" in clip.info.warnings[0]
    assert 60 < clip.info.total_frames < FRAMES
    last = clip.info.total_frames - 1
    np.testing.assert_array_equal(clip.read([last], HEIGHT, WIDTH).frames[0], decoded(tmp_path / "whole.mp4")[0][-1])


def copied(source: Path, target: Path, change: Callable[[av.Packet], None]) -> Path:
    """Copy the packets of a file, each after a change."""
    with av.open(str(source)) as before, av.open(str(target), "w") as after:
        stream = before.streams.video[0]
        copy = after.add_stream_from_template(stream)
        for packet in before.demux(stream):
            if packet.size:
                change(packet)
                packet.stream = copy
                after.mux(packet)
    return target
