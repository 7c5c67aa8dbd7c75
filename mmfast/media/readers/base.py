"""What a video reader is: it opens a file as a :class:`Clip`, and a clip gives frames by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels: TypeAlias = NDArray[np.uint8]

FALLBACK_FPS = 24.0


@dataclass(frozen=True)
class ClipInfo:
    """What is known of a clip before its frames are read.

    Attributes:
        name: how error messages call it: the path.
        total_frames: number of frames, at least 1.
        fps: frames per second.
        height: of a displayed frame: after rotation.
        width: of a displayed frame.
        warnings: what the caller should know, a line each.
    """

    name: str
    total_frames: int
    fps: float
    height: int
    width: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Decoded:
    """Frames as they came out of a clip.

    Attributes:
        frames: uint8 ``[k, H, W, 3]``; k is smaller than the number asked if the clip ended before.
        timestamps: seconds since the first frame of the clip, one per frame.
        total_frames: number of frames, corrected if the clip ended early.
        warnings: what the caller should know, a line each.
    """

    frames: Pixels
    timestamps: tuple[float, ...]
    total_frames: int
    warnings: tuple[str, ...] = ()


class Clip(Protocol):
    """A video that is open for reading."""

    @property
    def info(self) -> ClipInfo:
        """What is known without reading frames."""

    def read(self, indices: Sequence[int], height: int, width: int) -> Decoded:
        """Read frames.

        Args:
            indices: frame numbers, ascending, without repetition, below ``info.total_frames``.
            height: of the returned frames.
            width: of the returned frames.
        """

    def parts(self, indices: Sequence[int], height: int, width: int, count: int) -> Iterator[Decoded]:
        """Read frames as :meth:`read` does, ``count`` at a time, so that no more than these are held."""


class ReadsInParts:
    """Parts of a clip in which any frame is found as fast as the next one."""

    def parts(self: Clip, indices: Sequence[int], height: int, width: int, count: int) -> Iterator[Decoded]:
        """Read frames, ``count`` at a time."""
        for start in range(0, len(indices), count):
            yield self.read(indices[start : start + count], height, width)


class Reader(Protocol):
    """A way to decode video files."""

    def __call__(self, path: Path, *, max_pixels: int, timeout: float) -> Clip:
        """Open a file.

        Args:
            path: an existing file that starts like a video.
            max_pixels: largest legal width x height of a frame.
            timeout: seconds after which a reader that works in another process is stopped.

        Raises:
            MediaError: if the file cannot be decoded.
        """


def resized(frame: Pixels, height: int, width: int) -> Pixels:
    """Resize a frame, bicubic with antialiasing, as image processors do.

    Args:
        frame: uint8 ``[H, W, 3]``.
        height: wanted height.
        width: wanted width.

    Example:
        >>> resized(np.zeros((8, 4, 3), np.uint8), 4, 2).shape
        (4, 2, 3)
    """
    if frame.shape[:2] == (height, width):
        return frame
    image = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def shortened(numbers: Sequence[int]) -> str:
    """Write frame numbers into a message, the first five of them.

    Example:
        >>> shortened([3, 4]), shortened(range(8))
        ('3, 4', '0, 1, 2, 3, 4 and 3 more')
    """
    shown = ", ".join(str(number) for number in numbers[:5])
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"
