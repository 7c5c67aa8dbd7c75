"""A video, from a file, a folder or an array, to the few frames that a model looks at."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from PIL import Image

from mmfast.media.errors import MediaError
from mmfast.media.readers import READERS, Clip, ClipInfo
from mmfast.media.readers.base import Pixels, shortened
from mmfast.media.sampling import (
    check_indices,
    check_numbers,
    check_part,
    choose_frames,
    choose_sampler,
    frames_of_part,
)
from mmfast.media.source import (
    MAX_FRAME_PIXELS,
    MAX_MEMORY,
    MAX_VIDEO_BYTES,
    check_memory,
    check_size,
    open_source,
    target_size,
)

MAX_FRAMES = 768


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video, and where they come from.

    Attributes:
        frames: uint8 ``[T, H, W, 3]``, RGB, upright.
        indices: number of each frame in the source, from 0.
        timestamps: seconds since the first frame of the source, one per frame.
        fps: frames per second of the source.
        total_frames: number of frames that the source has.
        duration: seconds of the source, or of the part of it that the frames were chosen from.
        reader: what read it: ``pyav``, ``decord``, ``torchcodec``, ``folder``, ``npy`` or ``array``.
        sampler: the rule that chose the frames, or ``"indices"``.
        warnings: what is not as asked or promised (cut-off file, fewer frames, assumed rate), a line each.
    """

    frames: Pixels
    indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    fps: float
    total_frames: int
    duration: float
    reader: str
    sampler: str
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def rate(self) -> float:
        """How many of these frames show one second; 1.0 where the file does not say how long it is."""
        return len(self) / self.duration if self.duration > 0 else 1.0

    def images(self) -> list[Image.Image]:
        """Return the frames as Pillow images, which share no memory with ``frames``."""
        return [Image.fromarray(frame) for frame in self.frames]


def read_video(
    source: str | os.PathLike[str] | Pixels | Sequence[Any],
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    indices: Sequence[int] | None = None,
    sampler: str | None = None,
    start: float = 0.0,
    end: float | None = None,
    size: int | tuple[int, int] | None = None,
    reader: str = "pyav",
    source_fps: float | None = None,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_FRAME_PIXELS,
    max_bytes: int = MAX_VIDEO_BYTES,
    max_memory: int = MAX_MEMORY,
    timeout: float = 120.0,
) -> Video:
    """Read frames of a video.

    Give at most one of ``num_frames``, ``fps`` and ``indices``; none means 32 frames. Fewer frames come back
    where the video has fewer; none is repeated. An index or a start beyond the end gives the last frame, with a
    warning.

    Args:
        source: a video file (MP4/MOV, MKV/WEBM, AVI, MPEG-TS/PS, FLV, ASF, OGG), a folder of images, a
            ``.npy`` file or array uint8 ``[T, H, W, 3]``, or a list of frames (paths, Pillow images, uint8
            ``[H, W, 3]``).
        num_frames: frames wanted.
        fps: frames wanted per second of video.
        indices: frame numbers from 0, in any order; returned in that order.
        sampler: rule that chooses the frames, see :mod:`mmfast.media.sampling`; None: ``linspace`` for
            ``num_frames``, ``fps`` for ``fps``.
        start: where in the video frames are chosen, in seconds.
        end: where that part ends; None for the end of the video. However short it is, one frame is in it.
        size: None: as in the file; int: the longer side is brought down to it; (height, width): exactly that.
        reader: ``"pyav"`` (exact for every format); ``"torchcodec"`` (falls back to PyAV, with a warning);
            ``"decord"`` (in another process; returns wrong frames for some files, see its module).
        source_fps: frames per second of a folder, list or array; 24 is assumed, with a warning, if None.
        max_frames: most frames that may be returned.
        max_pixels: largest legal width x height of a frame, checked before decoding.
        max_bytes: largest legal file.
        max_memory: most bytes that the returned frames may take, checked before decoding.
        timeout: seconds that decord may take for opening, and for reading.

    Raises:
        TypeError: if an argument has the wrong type.
        MediaError: if the source cannot be read, or not within these limits.

    Example:
        >>> from mmfast.media import sample
        >>> video = read_video(sample("bigbuckbunny.mp4"), indices=[0, 5], size=64)
        >>> video.frames.shape, video.timestamps, video.total_frames
        ((2, 36, 64, 3), (0.0, 0.2), 132)
    """
    check_numbers(num_frames=num_frames, fps=fps, max_frames=max_frames)
    check_part(start, end)
    check_size(size)
    if reader not in READERS:
        near = get_close_matches(str(reader), READERS)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise MediaError(f"reader={reader!r} is unknown; {hint}There are: {', '.join(READERS)}")
    if indices is not None:
        if (num_frames, fps, sampler, start, end) != (None, None, None, 0.0, None):
            raise MediaError("indices exclude num_frames, fps, sampler, start and end; give indices alone or none")
        wanted = check_indices(indices, max_frames=max_frames)
        rule = "indices"
    else:
        rule = choose_sampler(sampler, num_frames=num_frames, fps=fps)

    def plan(info: ClipInfo) -> list[int]:
        if indices is not None:
            return [min(index, info.total_frames - 1) for index in wanted]
        part = frames_of_part(info.total_frames, info.fps, start, end)
        chosen = choose_frames(len(part), info.fps, num_frames=num_frames, fps=fps, sampler=rule, max_frames=max_frames)
        return [part[index] for index in chosen]

    def read(reader: str) -> Video:
        clip, by = open_source(
            source,
            reader=reader,
            source_fps=source_fps,
            may_differ=isinstance(size, tuple),
            max_pixels=max_pixels,
            max_bytes=max_bytes,
            timeout=timeout,
        )
        video = _collect(clip, plan, size, max_memory)
        part = frames_of_part(video.total_frames, video.fps, start, end)
        return replace(video, duration=len(part) / video.fps, reader=by, sampler=rule)

    extra: tuple[str, ...] = ()
    if reader == "torchcodec":
        # It is only ever faster, never needed, and fails in many ways (import, libraries, formats).
        try:
            video = read(reader)
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            extra = (f"torchcodec failed ({type(error).__name__}: {line}); read with pyav",)
            video = read("pyav")
    else:
        video = read(reader)
    if indices is not None and (beyond := [index for index in wanted if index >= video.total_frames]):
        extra += (f"the last frame is {video.total_frames - 1}; it stands for {shortened(beyond)}",)
    if num_frames is not None and len(video) < num_frames:
        extra += (f"num_frames={num_frames}, but there are only {len(video)} frames",)
    if start * video.fps >= video.total_frames:
        extra += (f"start={start}: the video ends at {video.total_frames / video.fps:g} s; its last frame is shown",)
    return replace(video, warnings=video.warnings + extra)


def _collect(
    clip: Clip, plan: Callable[[ClipInfo], list[int]], size: int | tuple[int, int] | None, max_memory: int
) -> Video:
    info = clip.info
    height, width = target_size(info, size)
    targets = plan(info)
    wanted = sorted(set(targets))
    check_memory(info, len(wanted), height, width, max_memory)
    decoded = clip.read(wanted, height, width)
    if len(decoded.frames) < len(wanted):
        # The clip ended before its counted end; now the end is known, so choose again.
        if decoded.total_frames == 0:
            raise MediaError(f"{info.name}: no frame can be decoded; give another file")
        info = replace(
            info,
            total_frames=decoded.total_frames,
            warnings=(
                *info.warnings,
                f"{info.name}: {info.total_frames} frames counted, {decoded.total_frames} can be decoded",
            ),
        )
        targets = plan(info)
        wanted = sorted(set(targets))
        decoded = clip.read(wanted, height, width)
        if len(decoded.frames) < len(wanted):
            raise MediaError(f"{info.name}: decodes differently each time; convert it to another format")
    place = {index: position for position, index in enumerate(wanted)}
    order = [place[index] for index in targets]
    return Video(
        # Sampled frames are in order already: no copy.
        frames=decoded.frames if targets == wanted else decoded.frames[order],
        indices=tuple(targets),
        timestamps=tuple(decoded.timestamps[position] for position in order),
        fps=info.fps,
        total_frames=info.total_frames,
        duration=info.total_frames / info.fps,
        reader="",
        sampler="",
        warnings=info.warnings + decoded.warnings,
    )
