"""decord, only when asked for by name: in another process with a time limit, because it can spin for ever.

Its seeking returns wrong frames without a word for open GOPs, HEVC, transport streams and AVI with B-frames.
For the containers and codecs where that is common, two frames are compared with PyAV's and a difference is
reported.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfast.media.errors import MediaError
from mmfast.media.readers.base import FALLBACK_FPS, ClipInfo, Decoded, Pixels, ReadsInParts
from mmfast.media.readers.pyav import inspect, open_with_pyav

CHILD = Path(__file__).with_name("decord_child.py")

_DOUBTFUL_CODECS = {"hevc"}
_DOUBTFUL_CONTAINERS = {"avi", "mpegts"}
# Two decodings of one frame differ by rounding, 1 to 2 of 255 on average.
_SAME_FRAME = 8.0


def open_with_decord(path: Path, *, max_pixels: int, timeout: float, child: Path = CHILD) -> DecordClip:
    """Open a file with decord.

    Args:
        path: video file.
        max_pixels: largest legal width x height of a frame.
        timeout: seconds after which decord is stopped, for opening and for each read.
        child: the script that runs decord.

    Raises:
        MediaError: if decord is not installed, cannot open the file, crashes, or takes too long.
    """
    codec, container = inspect(path, max_pixels)
    doubtful = codec in _DOUBTFUL_CODECS or container in _DOUBTFUL_CONTAINERS
    info, _, _ = _ask(child, timeout, path)
    return DecordClip(path, max_pixels, timeout, child, doubtful, info)


@dataclass(frozen=True)
class DecordClip(ReadsInParts):
    """A file that decord can open.

    Attributes:
        path: the file.
        max_pixels: largest legal width x height of a frame.
        timeout: seconds that a read may take.
        child: the script that runs decord.
        doubtful: whether decord is known to return wrong frames for such files.
        info: what was found when it was opened.
    """

    path: Path
    max_pixels: int
    timeout: float
    child: Path
    doubtful: bool
    info: ClipInfo

    def read(self, indices: Sequence[int], height: int, width: int) -> Decoded:
        """Decode frames in another process."""
        _, times, data = _ask(self.child, self.timeout, self.path, list(indices), height, width)
        shape = (len(indices), height, width, 3)
        if len(data) != math.prod(shape):
            raise MediaError(f"{self.path}: decord returned {len(data)} bytes for {list(shape)}; use reader='pyav'")
        frames = np.frombuffer(bytearray(data), np.uint8).reshape(shape)
        warnings = self._compare(indices, frames) if self.doubtful else ()
        return Decoded(frames, times, self.info.total_frames, warnings)

    def _compare(self, indices: Sequence[int], frames: Pixels) -> tuple[str, ...]:
        """Decode two of the frames again, from the beginning, and report which are not the same."""
        chosen = sorted({len(indices) // 2, len(indices) - 1})
        again = open_with_pyav(self.path, max_pixels=self.max_pixels).read(
            [indices[place] for place in chosen], *frames.shape[1:3]
        )
        wrong = [
            str(indices[place])
            for place, frame in zip(chosen, again.frames, strict=False)
            if np.abs(frames[place].astype(np.int16) - frame).mean() > _SAME_FRAME
        ]
        if len(again.frames) == len(chosen) and not wrong:
            return ()
        which = f"another frame than asked at {', '.join(wrong)}" if wrong else "frames that do not exist"
        return (f"{self.path}: decord returned {which}; use reader='pyav' for exact frames",)


def _ask(
    child: Path, timeout: float, path: Path, indices: Sequence[int] = (), height: int = 0, width: int = 0
) -> tuple[ClipInfo, tuple[float, ...], bytes]:
    """Run the child; returns what it says of the clip, the times of the frames, and their bytes."""
    request = {"path": str(path), "indices": indices, "height": height, "width": width}
    try:
        # A process can be killed: decord has been seen to spin in native code holding the interpreter's lock.
        # -P keeps this folder off the import path, where decord.py would hide the library.
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-P", str(child)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise MediaError(
            f"{path}: decord gave no answer within timeout={timeout:g} seconds and was stopped; "
            "use reader='pyav' or a longer timeout"
        ) from error
    if done.returncode != 0:
        raise MediaError(f"{path}: {_reason(done)}; use reader='pyav'")
    header, _, data = done.stdout.partition(b"\n")
    try:
        answer = json.loads(header)
        fps, warnings = float(answer["fps"]), []
        if not 0 < fps < math.inf:
            fps = FALLBACK_FPS
            warnings.append(f"{path}: no frame rate; {FALLBACK_FPS:g} per second assumed")
        total, height, width = (int(answer[name]) for name in ("total_frames", "height", "width"))
        info = ClipInfo(str(path), total, fps, height, width, tuple(warnings))
        return info, tuple(answer["timestamps"]), data
    except (ValueError, KeyError, TypeError) as error:
        raise MediaError(f"{path}: decord gave no usable answer; use reader='pyav'") from error


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode < 0:
        return f"decord crashed (signal {-done.returncode})"
    text = done.stderr.decode(errors="replace")
    if "No module named 'decord'" in text:
        return "decord is not installed: pip install 'mmfast[video]'"
    # The last line of a traceback names the error; decord goes on with a stack of its own below it.
    lines = [line for line in text.splitlines() if "Error" in line and not line.startswith(" ")]
    return f"decord cannot read it ({lines[-1][:200] if lines else 'no reason given'})"
