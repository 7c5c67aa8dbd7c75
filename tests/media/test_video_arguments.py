"""What read_video accepts besides files, and how its arguments work together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfast.media import MediaError, Video, read_video


@pytest.fixture
def frames(clips) -> np.ndarray:
    return np.stack([clips.numbered(n) for n in range(12)])


@pytest.mark.parametrize("kind", ["array", "npy", "folder", "list of arrays", "list of images", "list of paths"])
def test_sources_without_a_decoder(clips, frames: np.ndarray, tmp_path: Path, kind: str) -> None:
    paths = [tmp_path / f"frame{number}.png" for number in range(12)]
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame).save(path)
    np.save(tmp_path / "frames.npy", frames)
    source = {
        "array": frames,
        "npy": tmp_path / "frames.npy",
        # Alphabetical order would put frame10 before frame2.
        "folder": tmp_path,
        "list of arrays": list(frames),
        "list of images": [Image.fromarray(frame) for frame in frames],
        "list of paths": [str(path) for path in paths],
    }[kind]
    video = read_video(source, num_frames=4, source_fps=2.0)
    assert clips.numbers(video.frames) == list(video.indices) == [0, 3, 7, 11]
    assert video.timestamps == (0.0, 1.5, 3.5, 5.5)
    assert (video.duration, video.reader, video.warnings) == (6.0, kind.split()[0].replace("list", "array"), ())
    assert video.frames.flags.writeable


def test_unknown_rate_is_assumed_and_said(frames: np.ndarray) -> None:
    video = read_video(frames, num_frames=2)
    assert video.fps == 24.0
    assert "24 per second assumed" in video.warnings[0]


def test_folder_skips_what_is_no_image(frames: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(frames[0]).save(tmp_path / "a.png")
    (tmp_path / "b.txt").write_text("notes")
    (tmp_path / ".c.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert read_video(tmp_path).total_frames == 1


def test_frames_of_different_sizes(frames: np.ndarray) -> None:
    mixed = [frames[0], frames[1][:32]]
    with pytest.raises(MediaError, match=r"frame 1 is 96x32 pixels and frame 0 96x64; pass size="):
        read_video(mixed)
    assert read_video(mixed, size=(10, 20)).frames.shape == (2, 10, 20, 3)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), r"float32 \[4, 8, 8, 3\]"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"uint8 \[4, 3, 8, 8\]"),
        (np.zeros((8, 8, 3), np.uint8), r"uint8 \[8, 8, 3\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no frames"),
        (np.zeros((1, 0, 8, 3), np.uint8), "empty"),
        ([], "no frames"),
        ([np.zeros((8, 8), np.uint8)], r"frame 0 is an array uint8 \[8, 8\]"),
        ([3], "frame 0 is int"),
    ],
)
def test_arrays_that_are_no_frames(array, found: str) -> None:
    with pytest.raises(MediaError, match=found):
        read_video(array)


def test_damaged_npy(frames: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "whole.npy", frames)
    data = (tmp_path / "whole.npy").read_bytes()
    for length in (6, 10, 100, len(data) // 2):
        (tmp_path / "cut.npy").write_bytes(data[:length])
        with pytest.raises(MediaError, match="cannot be read"):
            read_video(tmp_path / "cut.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(MediaError, match="cannot be read"):
        read_video(tmp_path / "objects.npy")


@pytest.mark.parametrize(
    ("size", "shape"),
    [(None, (64, 96)), (200, (64, 96)), (48, (32, 48)), (1, (1, 1)), ((20, 30), (20, 30)), ((99, 7), (99, 7))],
)
def test_size(clips, size, shape) -> None:
    video = read_video(clips.get("mkv"), indices=[0, 5], size=size)
    assert video.frames.shape == (2, *shape, 3)


def test_resized_frames_are_still_the_right_ones(clips) -> None:
    video = read_video(clips.get("h264-open-gop"), num_frames=12, size=32)
    assert clips.numbers(video.frames) == list(video.indices)


def test_default_is_32_frames_over_the_whole_clip(clips) -> None:
    video = read_video(clips.get("mkv"))
    assert (len(video), video.indices[0], video.indices[-1], video.sampler) == (32, 0, 47, "linspace")


def test_fewer_frames_than_asked(clips) -> None:
    video = read_video(clips.get("mkv"), num_frames=100)
    assert video.indices == tuple(range(48))
    assert video.warnings == ("num_frames=100, but there are only 48 frames",)


def test_indices_beyond_the_end(clips) -> None:
    video = read_video(clips.get("mkv"), indices=[50, 3, 999, 3])
    assert video.indices == (47, 3, 47, 3)
    assert clips.numbers(video.frames) == [47, 3, 47, 3]
    assert video.warnings == ("the last frame is 47; it stands for 50, 999",)


@pytest.mark.parametrize(
    ("start", "end", "indices", "duration"),
    [
        (3.0, 5.0, (6, 7, 9), 2.0),
        (4.4, None, (8, 9, 11), 2.0),
        (0.0, 1.1, (0, 1, 2), 1.5),
        (5.0, 99.0, (10, 11), 1.0),
        (2.0, 2.0, (4,), 0.5),
        (2.0, 1.0, (4,), 0.5),
    ],
)
def test_a_part_is_chosen_from_as_if_it_were_all(
    clips, frames: np.ndarray, start: float, end: float | None, indices: tuple[int, ...], duration: float
) -> None:
    video = read_video(frames, num_frames=3, start=start, end=end, source_fps=2.0)
    assert clips.numbers(video.frames) == list(video.indices) == list(indices)
    assert (video.total_frames, video.duration, video.rate) == (12, duration, len(indices) / duration)
    few = () if len(indices) == 3 else (f"num_frames=3, but there are only {len(indices)} frames",)
    assert video.warnings == few


def test_a_part_beyond_the_end_is_the_last_frame(frames: np.ndarray) -> None:
    video = read_video(frames, fps=1.0, start=6.0, end=7.0, source_fps=2.0)
    assert video.indices == (11,)
    assert video.warnings == ("start=6.0: the video ends at 6 s; its last frame is shown",)


def test_max_frames_limits_a_rate(clips) -> None:
    assert len(read_video(clips.get("mkv"), fps=30.0, max_frames=10)) == 10


def test_images(clips) -> None:
    video = read_video(clips.get("mkv"), indices=[0, 1])
    assert [image.size for image in video.images()] == [(96, 64), (96, 64)]
    np.testing.assert_array_equal(np.asarray(video.images()[1]), video.frames[1])


def test_result_cannot_be_reassigned(clips) -> None:
    video: Video = read_video(clips.get("mkv"), indices=[0])
    with pytest.raises(AttributeError):
        video.fps = 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_frames": 0}, MediaError, r"num_frames=0 must lie in 1..768"),
        ({"num_frames": 769}, MediaError, r"num_frames=769 must lie in 1..768"),
        ({"num_frames": 4, "max_frames": 0}, MediaError, "max_frames=0"),
        ({"num_frames": 4.0}, TypeError, "num_frames=4.0"),
        ({"num_frames": True}, TypeError, "num_frames=True"),
        ({"fps": 0}, MediaError, "fps=0"),
        ({"fps": float("nan")}, MediaError, "fps=nan"),
        ({"fps": "2"}, TypeError, "fps='2'"),
        ({"num_frames": 4, "fps": 2.0}, MediaError, "exclude each other"),
        ({"indices": [0], "num_frames": 1}, MediaError, "give indices alone"),
        ({"indices": [0], "sampler": "linspace"}, MediaError, "give indices alone"),
        ({"indices": [0], "start": 1.0}, MediaError, "give indices alone"),
        ({"indices": [0], "end": 1.0}, MediaError, "give indices alone"),
        ({"start": -1.0}, MediaError, "start=-1.0 must be a finite number of seconds"),
        ({"end": float("nan")}, MediaError, "end=nan must be a finite number of seconds"),
        ({"start": None}, TypeError, "start=None must be a number"),
        ({"end": "2"}, TypeError, "end='2' must be a number"),
        ({"indices": []}, MediaError, "holds 0 frames"),
        ({"indices": [-1]}, MediaError, "start at 0"),
        ({"indices": [1.0]}, TypeError, "no frame number"),
        ({"indices": 3}, TypeError, "list of frame numbers"),
        ({"indices": range(769)}, MediaError, "holds 769 frames"),
        ({"sampler": "linspaec"}, MediaError, "did you mean 'linspace'"),
        ({"sampler": "midpoint", "fps": 2.0}, MediaError, "goes by count"),
        ({"sampler": "stride"}, MediaError, "goes by rate"),
        ({"reader": "pyva"}, MediaError, "did you mean 'pyav'"),
        ({"size": 0}, MediaError, "size=0"),
        ({"size": (4,)}, TypeError, r"size=\(4,\)"),
        ({"size": 4.5}, TypeError, "size=4.5"),
        ({"source_fps": 0.0}, MediaError, "source_fps=0.0"),
    ],
)
def test_wrong_arguments(frames: np.ndarray, arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        read_video(frames, **arguments)


@pytest.mark.parametrize("source", [None, 3, b"bytes", {"a": 1}])
def test_wrong_source(source) -> None:
    with pytest.raises(TypeError, match="it must be a path"):
        read_video(source)
