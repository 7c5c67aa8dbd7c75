"""A long video, clip after clip: whatever its length, only one clip is held."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from mmfast.media.errors import MediaError
from mmfast.media.readers.base import Clip, Pixels
from mmfast.media.sampling import check_numbers
from mmfast.media.source import (
    MAX_FRAME_PIXELS,
    MAX_MEMORY,
    MAX_VIDEO_BYTES,
    check_memory,
    check_size,
    open_source,
    target_size,
)
from mmfast.media.video import Video


def video_clips(
    source: str | os.PathLike[str] | Pixels | Sequence[Any],
    *,
    clip_frames: int = 16,
    fps: float | None = None,
    size: int | tuple[int, int] | None = None,
    source_fps: float | None = None,
    max_pixels: int = MAX_FRAME_PIXELS,
    max_bytes: int = MAX_VIDEO_BYTES,
    max_memory: int = MAX_MEMORY,
) -> Iterator[Video]:
    """Read a video from its first frame to its last, as clips of a few frames each.

    The file is opened, and refused if need be, by the call; frames are decoded as clips are asked for. With
    :func:`mmfast.media.prefetched` the next ones are decoded while a model works on the last.

    Args:
        source: what :func:`mmfast.media.read_video` takes.
        clip_frames: frames of a clip; the last may have fewer.
        fps: frames wanted per second of video: every k-th, with ``k = round(rate of the file / fps)``; None: all.
        size: as in :func:`mmfast.media.read_video`.
        source_fps: frames per second of a folder, list or array; 24 is assumed, with a warning, if None.
        max_pixels: largest legal width x height of a frame.
        max_bytes: largest legal file.
        max_memory: most bytes that the frames of a clip may take.

    Returns:
        An iterator over :class:`mmfast.media.Video`, whose indices and timestamps count from the start of the
        whole video; warnings on the file as a whole come with the first.

    Raises:
        TypeError: if an argument has the wrong type.
        MediaError: if the source cannot be read, or not within these limits.

    Example:
        >>> from mmfast.media import sample
        >>> clips = video_clips(sample("bigbuckbunny.mp4"), clip_frames=4, fps=1.0, size=64)
        >>> [clip.timestamps for clip in clips]
        [(0.0, 1.0, 2.0, 3.0), (4.0, 5.0)]
    """
    if isinstance(clip_frames, bool) or not isinstance(clip_frames, int):
        raise TypeError(f"clip_frames={clip_frames!r} must be a whole number (int)")
    if clip_frames < 1:
        raise MediaError(f"clip_frames={clip_frames} must be at least 1")
    check_numbers(num_frames=None, fps=fps, max_frames=1)
    check_size(size)
    clip, reader = open_source(
        source,
        reader="pyav",
        source_fps=source_fps,
        may_differ=isinstance(size, tuple),
        max_pixels=max_pixels,
        max_bytes=max_bytes,
        timeout=0.0,
    )
    step = 1 if fps is None else max(1, round(clip.info.fps / fps))
    indices = range(0, clip.info.total_frames, step)
    height, width = target_size(clip.info, size)
    check_memory(clip.info, min(clip_frames, len(indices)), height, width, max_memory)
    return _read(clip, reader, indices, height, width, clip_frames)


def _read(clip: Clip, reader: str, indices: range, height: int, width: int, clip_frames: int) -> Iterator[Video]:
    info, done = clip.info, 0
    warnings = info.warnings
    for part in clip.parts(indices, height, width, clip_frames):
        chosen = indices[done : done + len(part.frames)]
        done += len(chosen)
        warnings += part.warnings
        if part.total_frames < info.total_frames:
            warnings += (f"{info.name}: {info.total_frames} frames counted, {part.total_frames} can be decoded",)
        yield Video(
            frames=part.frames,
            indices=tuple(chosen),
            timestamps=part.timestamps,
            fps=info.fps,
            total_frames=part.total_frames,
            duration=part.total_frames / info.fps,
            reader=reader,
            sampler="stride",
            warnings=warnings,
        )
        warnings = ()
