"""decord works in a process of its own, which can hang, crash or talk nonsense without harm."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmfast.media import MediaError, read_video
from mmfast.media.readers import READERS
from mmfast.media.readers.decord import CHILD, open_with_decord

needs_decord = pytest.mark.skipif(
    importlib.util.find_spec("decord") is None, reason="decord is not installed (pip install 'mmfast[video]')"
)


def opened_with(script: str, clips, tmp_path: Path, timeout: float = 30.0):
    (tmp_path / "child.py").write_text(script)
    return open_with_decord(
        clips.get("h264-closed-gop"), max_pixels=10_000, timeout=timeout, child=tmp_path / "child.py"
    )


@needs_decord
@pytest.mark.parametrize("name", ["h264-closed-gop", "vp9", "mkv"])
def test_exact_frames(clips, name: str) -> None:
    order = [40, 3, 17, 0, 47, 29]
    video = read_video(clips.get(name), indices=order, reader="decord")
    assert clips.numbers(video.frames) == order
    assert (video.reader, video.total_frames, video.fps, video.warnings) == ("decord", 48, 30.0, ())
    np.testing.assert_allclose(video.timestamps, np.array(order) / 30, atol=0.0011)


@needs_decord
def test_resizes_like_pyav(clips) -> None:
    one, other = (
        read_video(clips.get("h264-closed-gop"), num_frames=6, size=40, reader=reader).frames
        for reader in ("decord", "pyav")
    )
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other).mean() < 2
    one[:] = 0  # the caller may write into the frames


@needs_decord
def test_rotation(clips, tmp_path: Path) -> None:
    path = clips.rotated(clips.get("h264-closed-gop"), tmp_path / "turned.mp4", 90)
    one, other = (read_video(path, indices=[9], reader=reader).frames for reader in ("decord", "pyav"))
    assert one.shape == other.shape == (1, 96, 64, 3)
    assert np.abs(one.astype(int) - other).mean() < 2


@needs_decord
@pytest.mark.parametrize("name", ["transport-stream", "avi-b-frames", "avi-h264", "hevc"])
def test_wrong_frames_do_not_pass_in_silence(clips, name: str) -> None:
    try:
        video = read_video(clips.get(name), indices=[20, 33], reader="decord")
    except MediaError as error:
        numbers, said = [], [str(error)]
    else:
        numbers, said = clips.numbers(video.frames), list(video.warnings)
    assert (numbers == [20, 33]) == (said == [])
    assert all("use reader='pyav'" in line for line in said)


@needs_decord
def test_unreadable_file(clips, tmp_path: Path) -> None:
    path = clips.png_clip(tmp_path / "garbage.mov", bytes(range(200)))
    with pytest.raises(MediaError, match=r"garbage.mov: decord cannot read it \(.+\); use reader='pyav'"):
        READERS["decord"](path, max_pixels=10_000, timeout=30.0)


@needs_decord
def test_child_loads_no_torch(clips) -> None:
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({str(CHILD)!r}, run_name='__main__')\n"
        "print(sorted({'torch', 'mmfast', 'av'} & set(sys.modules)), file=sys.stderr)"
    )
    request = json.dumps({"path": str(clips.get("mkv")), "indices": [1], "height": 64, "width": 96})
    done = subprocess.run([sys.executable, "-c", code], input=request.encode(), capture_output=True, check=True)
    assert done.stderr.decode().splitlines()[-1] == "[]"


STAND_IN = """
import os
import numpy

os.write(1, b"chatter of a native library")
print("chatter of Python")

class VideoReader:
    shape = (4, 6, 3)
    def __init__(self, index, ctx): self.index = index
    def __len__(self): return 5
    def __getitem__(self, index): return VideoReader(index, None)
    def asnumpy(self): return numpy.full((4, 6, 3), self.index, numpy.uint8)
    def get_avg_fps(self): return float("nan")
    def get_frame_timestamp(self, index): return [5.0 + index, 6.0 + index]

def cpu(device): return device
"""


def test_chatter_and_missing_rate(clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "decord.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    clip = open_with_decord(clips.get("h264-closed-gop"), max_pixels=10_000, timeout=30.0)
    assert (clip.info.total_frames, clip.info.height, clip.info.width, clip.info.fps) == (5, 4, 6, 24.0)
    assert "24 per second assumed" in clip.info.warnings[0]
    decoded = clip.read([1, 3], 2, 3)
    assert decoded.frames.shape == (2, 2, 3, 3)
    assert [frame.max() for frame in decoded.frames] == [1, 3]
    assert decoded.timestamps == (1.0, 3.0)


def test_hanging_child_is_killed(clips, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"import os, pathlib\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\nwhile True: pass"
    start = time.perf_counter()
    with pytest.raises(MediaError, match=r"no answer within timeout=1\.5 seconds and was stopped"):
        opened_with(script, clips, tmp_path, timeout=1.5)
    assert time.perf_counter() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_crashing_child(clips, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"decord crashed \(signal 11\); use reader='pyav'"):
        opened_with("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", clips, tmp_path)


def test_decord_missing(clips, tmp_path: Path) -> None:
    script = "import sys\nsys.modules['decord'] = None\nraise ModuleNotFoundError(\"No module named 'decord'\")"
    with pytest.raises(MediaError, match=r"decord is not installed: pip install 'mmfast\[video\]'"):
        opened_with(script, clips, tmp_path)


@pytest.mark.parametrize("script", ["", "print('nonsense')", "print('{}')"])
def test_nonsense_answers(clips, tmp_path: Path, script: str) -> None:
    with pytest.raises(MediaError, match="use reader='pyav'"):
        opened_with(script, clips, tmp_path)


def test_too_few_bytes(clips, tmp_path: Path) -> None:
    answer = {"total_frames": 48, "fps": 30.0, "height": 64, "width": 96, "timestamps": [0.0]}
    clip = opened_with(f"print({json.dumps(answer)!r})", clips, tmp_path)
    assert (clip.info.total_frames, clip.info.height, clip.info.width) == (48, 64, 96)
    with pytest.raises(MediaError, match="use reader='pyav'"):
        clip.read([0], 64, 96)
