"""Writing clips."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from mmfast.media.errors import MediaError
from mmfast.media.readers.base import Pixels

_SUFFIXES = (".mp4", ".mov", ".mkv")


def write_video(path: str | os.PathLike[str], frames: Pixels | Sequence[Image.Image | Pixels], fps: float) -> Path:
    """Write frames as a clip that browsers play: H.264, or MPEG-4 where this FFmpeg has no encoder for it.

    Odd sides are made even, which the pixel format needs, by repeating the last row or column.

    Args:
        path: ``.mp4``, ``.mov`` or ``.mkv`` file; overwritten if it exists.
        frames: uint8 ``[T, H, W, 3]``, or a list of Pillow images or uint8 ``[H, W, 3]`` of one size.
        fps: frames per second.

    Returns:
        The path.

    Raises:
        MediaError: if there is no frame, sizes differ, or the file cannot be written.

    Example:
        >>> from mmfast.media import read_video
        >>> path = write_video("grey.mp4", np.full((5, 32, 48, 3), 128, np.uint8), fps=10)
        >>> read_video(path).duration
        0.5
    """
    import av

    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise MediaError(f"{path}: the name must end in {', '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise MediaError(f"{path}: the folder {path.parent} does not exist; create it first")
    if not 0 < fps <= 1000:
        raise MediaError(f"fps={fps} must lie in (0, 1000]")
    if len(frames) == 0:
        raise MediaError(f"{path}: no frames to write; give at least one")
    pictures = [_even(frame, f"{path}: frame {number}") for number, frame in enumerate(frames)]
    if len({picture.shape for picture in pictures}) > 1:
        raise MediaError(f"{path}: frames of different sizes; bring them to one size first")
    rate = Fraction(fps).limit_denominator(1001)
    codec, options = _encoder()
    try:
        # The index goes to the front, so that a file cut off in transfer can still be read in part.
        with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream(codec, rate=rate, options=options)
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            for number, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = number, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def _encoder() -> tuple[Literal["libx264", "mpeg4"], dict[str, str]]:
    from av.codec import codecs_available

    if "libx264" in codecs_available:
        return "libx264", {"crf": "18", "preset": "veryfast"}
    return "mpeg4", {"qscale": "3"}


def _even(frame: Image.Image | Pixels, name: str) -> Pixels:
    pixels = np.asarray(frame.convert("RGB")) if isinstance(frame, Image.Image) else np.asarray(frame)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise MediaError(f"{name} is {pixels.dtype} {list(pixels.shape)}; give uint8 [H, W, 3] or a Pillow image")
    height, width = pixels.shape[:2]
    return np.ascontiguousarray(np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))
