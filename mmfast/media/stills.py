"""Videos that need no decoder: a folder of images, a NumPy file, a list or an array of frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmfast.media.errors import MediaError
from mmfast.media.image import check_shape, load_image
from mmfast.media.readers.base import FALLBACK_FPS, ClipInfo, Decoded, Pixels, ReadsInParts, resized


@dataclass(frozen=True, eq=False)
class StillsClip(ReadsInParts):
    """Frames that are there already.

    Attributes:
        items: one frame each: a path, a Pillow image, or uint8 ``[H, W, 3]``.
        info: their number and the size of the first.
        max_pixels: largest legal width x height.
        may_differ: whether frames of other sizes than the first are resized; otherwise they are an error.
    """

    items: Sequence[Any] | Pixels
    info: ClipInfo
    max_pixels: int
    may_differ: bool

    def read(self, indices: Sequence[int], height: int, width: int) -> Decoded:
        """Load the wanted frames, one at a time."""
        frames = np.empty((len(indices), height, width, 3), np.uint8)
        for place, index in enumerate(indices):
            frame = _pixels(self.items[index], f"{self.info.name}: frame {index}", self.max_pixels)
            if frame.shape[:2] != (self.info.height, self.info.width) and not self.may_differ:
                raise MediaError(
                    f"{self.info.name}: frame {index} is {frame.shape[1]}x{frame.shape[0]} pixels and "
                    f"frame 0 {self.info.width}x{self.info.height}; pass size=(height, width)"
                )
            frames[place] = resized(frame, height, width)
        return Decoded(frames, tuple(index / self.info.fps for index in indices), len(self.items))


def open_stills(
    items: Sequence[Any] | Pixels, name: str, *, max_pixels: int, source_fps: float | None, may_differ: bool
) -> StillsClip:
    """Take a sequence of frames as a clip.

    Args:
        items: paths, Pillow images or uint8 ``[H, W, 3]``; an array uint8 ``[T, H, W, 3]``.
        name: how error messages call it.
        max_pixels: largest legal width x height.
        source_fps: frames per second; 24 is assumed, with a warning, if None.
        may_differ: whether frames may have different sizes.

    Raises:
        MediaError: if there is no frame, or the first is none.

    Example:
        >>> frames = np.zeros((5, 4, 6, 3), np.uint8)
        >>> clip = open_stills(frames, "frames", max_pixels=100, source_fps=2.0, may_differ=False)
        >>> clip.read([0, 4], 4, 6).timestamps
        (0.0, 2.0)
    """
    if len(items) == 0:
        raise MediaError(f"{name}: no frames; give at least one")
    height, width = _pixels(items[0], f"{name}: frame 0", max_pixels).shape[:2]
    warnings = (
        () if source_fps else (f"{name}: no frame rate; {FALLBACK_FPS:g} per second assumed, or pass source_fps",)
    )
    info = ClipInfo(name, len(items), source_fps or FALLBACK_FPS, height, width, warnings)
    return StillsClip(items, info, max_pixels, may_differ)


def open_npy(path: Path) -> Pixels:
    """Map a NumPy file into memory; frames are read from disk when they are wanted.

    Raises:
        MediaError: if it holds anything but uint8 ``[T, H, W, 3]``, or is cut off.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise MediaError(f"{path}: a NumPy file that cannot be read ({error}); save it again") from error
    return check_array(array, str(path))


def check_array(array: Any, name: str) -> Pixels:
    """Refuse arrays that are not frames.

    Example:
        >>> check_array(np.zeros((5, 3, 4, 6)), "frames")
        Traceback (most recent call last):
        mmfast.media.errors.MediaError: frames: an array float64 [5, 3, 4, 6]; give uint8 [T, H, W, 3] with
        values 0..255
    """
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise MediaError(
            f"{name}: an array {array.dtype} {list(array.shape)}; give uint8 [T, H, W, 3] with values 0..255"
        )
    pixels: Pixels = array
    return pixels


def _pixels(item: Any, name: str, max_pixels: int) -> Pixels:
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3:
            raise MediaError(f"{name} is an array {item.dtype} {list(item.shape)}; give uint8 [H, W, 3]")
        check_shape(name, item.shape[1], item.shape[0], max_pixels)
        return item
    if not isinstance(item, str | Path | Image.Image):
        raise MediaError(f"{name} is {type(item).__name__}; give a path, a Pillow image or uint8 [H, W, 3]")
    return np.asarray(load_image(item, max_pixels=max_pixels))
