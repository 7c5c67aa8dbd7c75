"""What both ways of reading a video share: opening whatever was given, and the limits."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfast.media.errors import MediaError
from mmfast.media.readers import READERS, Clip, ClipInfo
from mmfast.media.readers.base import Pixels
from mmfast.media.sniff import VIDEOS, check_file, folder_images
from mmfast.media.stills import check_array, open_npy, open_stills

MAX_FRAME_PIXELS = 36_000_000
MAX_VIDEO_BYTES = 4 * 2**30
MAX_MEMORY = 2 * 2**30


def open_source(
    source: str | os.PathLike[str] | Pixels | Sequence[Any],
    *,
    reader: str,
    source_fps: float | None,
    may_differ: bool,
    max_pixels: int,
    max_bytes: int,
    timeout: float,
) -> tuple[Clip, str]:
    """Open whatever was given.

    Args:
        source: what :func:`mmfast.media.read_video` takes.
        reader: what opens files, by name.
        source_fps: frames per second of a folder, list or array.
        may_differ: whether frames of a list or folder may have different sizes.
        max_pixels: largest legal width x height of a frame.
        max_bytes: largest legal file.
        timeout: seconds that decord may take.

    Returns:
        The clip, and the name of what reads it.

    Raises:
        TypeError: if the source is nothing that could hold frames.
        MediaError: if it cannot be read, or not within these limits.
    """
    if source_fps is not None and not (math.isfinite(source_fps) and source_fps > 0):
        raise MediaError(f"source_fps={source_fps} must be a finite number above 0")
    items: Sequence[Any] | Pixels
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        name = str(path)
        if path.is_dir():
            items, by = folder_images(path), "folder"
        else:
            content = check_file(path, max_bytes=max_bytes)
            if content.kind == "video":
                return READERS[reader](path, max_pixels=max_pixels, timeout=timeout), reader
            if content.kind != "array":
                hint = ", or load_image() for an image" if content.kind == "image" else ""
                raise MediaError(
                    f"{path}: {content.name}, not a video; give {VIDEOS}, a folder of images or a NumPy file{hint}"
                )
            items, by = open_npy(path), "npy"
    elif isinstance(source, np.ndarray):
        items, by, name = check_array(source, "the array"), "array", "the array"
    elif isinstance(source, Sequence) and not isinstance(source, bytes):
        items, by, name = source, "array", "the list"
    else:
        raise TypeError(
            f"source is {type(source).__name__}; it must be a path, a list of frames or an array [T, H, W, 3]"
        )
    clip = open_stills(items, name, max_pixels=max_pixels, source_fps=source_fps, may_differ=may_differ)
    return clip, by


def check_size(size: int | tuple[int, int] | None) -> None:
    """Refuse sizes that are none.

    Raises:
        TypeError: if it is neither a whole number nor a pair of them.
        MediaError: if a side is below 1.

    Example:
        >>> check_size((0, 8))
        Traceback (most recent call last):
        mmfast.media.errors.MediaError: size=(0, 8) must be at least 1 pixel on each side
    """
    if size is None:
        return
    sides = size if isinstance(size, tuple) else (size,)
    integers = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not integers or (isinstance(size, tuple) and len(sides) != 2):
        raise TypeError(f"size={size!r} must be the longer side (int) or (height, width)")
    if min(sides) < 1:
        raise MediaError(f"size={size!r} must be at least 1 pixel on each side")


def target_size(info: ClipInfo, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Settle height and width of the frames to return.

    Example:
        >>> target_size(ClipInfo("clip", 1, 24.0, 1080, 1920), 448)
        (252, 448)
    """
    if isinstance(size, tuple):
        return size
    longer = max(info.height, info.width)
    if size is None or longer <= size:
        return info.height, info.width
    return max(1, round(info.height * size / longer)), max(1, round(info.width * size / longer))


def check_memory(info: ClipInfo, count: int, height: int, width: int, max_memory: int) -> None:
    """Refuse frames that take more memory than allowed.

    Raises:
        MediaError: if they do.

    Example:
        >>> check_memory(ClipInfo("clip", 9, 24.0, 100, 100), 9, 100, 100, 100_000)
        Traceback (most recent call last):
        mmfast.media.errors.MediaError: clip: 9 frames of 100x100 pixels take 270000 bytes, more than max_memory=100000;
        ask for fewer frames or a smaller size (size=448)
    """
    needed = count * height * width * 3
    if needed > max_memory:
        raise MediaError(
            f"{info.name}: {count} frames of {width}x{height} pixels take {needed} bytes, more than "
            f"max_memory={max_memory}; ask for fewer frames or a smaller size (size=448)"
        )
