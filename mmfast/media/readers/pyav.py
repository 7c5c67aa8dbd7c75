"""PyAV, the default reader: what it returns is what decoding from the first frame on and counting would give.

Seeking is what goes wrong elsewhere (open groups of pictures, B-frames in AVI, transport streams). So a frame is only
sought by its exact time, from a keyframe whose bits say that decoding can start there, in containers in which both
are known to hold; and where anything is not as the packets promise, the file is decoded from the beginning.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmfast.media.errors import MediaError
from mmfast.media.readers.base import FALLBACK_FPS, ClipInfo, Decoded, Pixels, shortened
from mmfast.media.readers.container import Decoding, Shaper, held_back, opened, video_stream
from mmfast.media.readers.index import Group, Index

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Packets of VP8 may hold frames that are never shown.
_HIDES_FRAMES = {"vp8"}

_FASTEST = 1000.0

# A decoder holds up to 16 pictures to refer to, so large ones are decoded by fewer threads at once.
_MOST_THREADS = 16
_PIXELS_AT_WORK = 32_000_000


def open_with_pyav(path: Path, *, max_pixels: int, timeout: float = 0.0) -> PyavClip:
    """Open a file with PyAV: count its frames and decode the first one.

    Frames are counted by their packets, without decoding. Where packets and frames may differ (a damaged
    file, one that starts between keyframes, hidden frames) all frames are decoded to count them; of a file that
    is only cut off, those after its last keyframe.

    Args:
        path: video file.
        max_pixels: largest legal width x height of a frame.
        timeout: not used; PyAV reads plain files and cannot wait for anything.

    Raises:
        MediaError: if there is no video stream, no frame can be decoded, or frames are too large.

    Example:
        >>> from mmfast.media import sample
        >>> clip = open_with_pyav(sample("bigbuckbunny.mp4"), max_pixels=10_000_000)
        >>> clip.info.total_frames, clip.info.fps, clip.info.height, clip.info.width
        (132, 25.0, 720, 1280)
    """
    with opened(path, max_pixels) as container:
        stream = video_stream(container, path, max_pixels)
        codec = stream.codec_context.name
        what = f"{codec} video in {container.format.name}"
        decoding = Decoding(container, stream)
        first = next(decoding.frames(), None)
        if first is None:
            raise MediaError(
                f"{path}: {what} of which no frame can be decoded: damaged, or larger than "
                f"max_pixels={max_pixels}; give another file or raise max_pixels"
            )
        sides = (first.width, first.height) if round(first.rotation / 90) % 2 else (first.height, first.width)
        Shaper(path, *sides, max_pixels)(first)
        decoding.skip_to_end()
        index = decoding.packets.index(container.format.name, first.pts)
        promised, rate = stream.frames, _rate(stream)
    total, damaged, hidden = decoding.packets.shown, decoding.damaged, decoding.packets.hidden
    if damaged and not (index and decoding.only_cut_off and _tail_decodes(path, max_pixels, index)):
        index = None
    if index is None and (damaged or not decoding.packets.starts_clean or codec in _HIDES_FRAMES):
        total, damaged = _count_by_decoding(path, max_pixels)
    warnings = []
    # With an edit list FFmpeg hides some packets and leaves others out: then fewer frames are no damage.
    if total < promised and (damaged or not hidden):
        warnings.append(f"{path}: {what} promises {promised} frames, {total} can be decoded: cut off or damaged")
    elif damaged:
        warnings.append(f"{path}: {what} has {damaged} damaged parts: frames may be missing or wrong there")
    if rate is None:
        warnings.append(f"{path}: no frame rate in the file; {FALLBACK_FPS:g} per second assumed")
    info = ClipInfo(str(path), total, rate or FALLBACK_FPS, *sides, tuple(warnings))
    return PyavClip(path, max_pixels, info, first.time, index)


@dataclass(frozen=True)
class Picture:
    """A frame as it is kept.

    Attributes:
        number: of the frame in the file.
        pixels: uint8 ``[H, W, 3]``.
        time: in seconds, by the clock of the file; None if it has none.
        corrupt: whether it was decoded from damaged data.
    """

    number: int
    pixels: Pixels
    time: float | None
    corrupt: bool = False


@dataclass
class Notes:
    """What was noticed while decoding from the beginning.

    Attributes:
        frames: frames that were there, if the end was reached before the last wanted one.
        damaged: packets that could not be read or decoded.
    """

    frames: int | None = None
    damaged: int = 0


@dataclass(frozen=True)
class PyavClip:
    """A file that PyAV can decode.

    Damage inside of pictures is only noticed in those that have to be decoded.

    Attributes:
        path: the file.
        max_pixels: largest legal width x height of a frame.
        info: what was found when it was opened.
        start: time of the first frame, in seconds.
        index: where its frames are; None: they are found by decoding from the beginning.
    """

    path: Path
    max_pixels: int
    info: ClipInfo
    start: float | None = None
    index: Index | None = field(default=None, repr=False)

    def read(self, indices: Sequence[int], height: int, width: int) -> Decoded:
        """Decode what is needed for the wanted frames, several groups of pictures at once where there are."""
        frames = np.empty((len(indices), height, width, 3), np.uint8)
        place = {number: place for place, number in enumerate(indices)}
        kept: dict[int, Picture] = {}
        notes = Notes()

        def keep(picture: Picture) -> None:
            frames[place[picture.number]] = picture.pixels
            kept[picture.number] = replace(picture, pixels=frames[place[picture.number]])

        if self.index is None or not self._read_groups(self.index, indices, height, width, keep):
            kept.clear()
            for picture in self._from_the_beginning(indices, height, width, notes):
                keep(picture)
        pictures = [kept[number] for number in indices if number in kept]
        return self._decoded(frames[: len(kept)], pictures, notes, self._clock())

    def parts(self, indices: Sequence[int], height: int, width: int, count: int) -> Iterator[Decoded]:
        """Decode frames in one pass, ``count`` at a time."""
        notes, clock = Notes(), self._clock()
        kept: list[Picture] = []
        # Only when the next frame is there or the end is reached is a part handed on: it holds what was noticed.
        for picture in self._in_order(indices, height, width, notes):
            if len(kept) == count:
                yield self._decoded(np.stack([picture.pixels for picture in kept]), kept, notes, clock)
                kept = []
            kept.append(picture)
        if kept:
            yield self._decoded(np.stack([picture.pixels for picture in kept]), kept, notes, clock)

    def _decoded(
        self, frames: Pixels, pictures: Sequence[Picture], notes: Notes, clock: Callable[[Picture], float]
    ) -> Decoded:
        doubtful = [picture.number for picture in pictures if picture.corrupt]
        warnings = []
        if notes.damaged and not self.info.warnings:
            warnings.append(f"{self.path}: {notes.damaged} damaged parts: frames may be missing or wrong there")
        if doubtful:
            warnings.append(f"{self.path}: decoded from damaged data: frames {shortened(doubtful)}")
        total = self.info.total_frames if notes.frames is None else notes.frames
        return Decoded(frames, tuple(clock(picture) for picture in pictures), total, tuple(warnings))

    def _clock(self) -> Callable[[Picture], float]:
        """Return what tells the seconds since the first frame; by the rate, where times are missing or jump back."""
        last: float | None = None

        def seconds(picture: Picture) -> float:
            nonlocal last
            by_rate = picture.number / self.info.fps
            since = by_rate if picture.time is None or self.start is None else picture.time - self.start
            # The clock jumps back where recordings were joined.
            last = by_rate if last is not None and since <= last else since
            return last

        return seconds

    def _in_order(self, indices: Sequence[int], height: int, width: int, notes: Notes) -> Iterator[Picture]:
        """Yield the wanted frames one after the other."""
        done = 0
        if self.index is not None:
            groups = deque(self.index.groups(indices))
            threads = min(_cores(), _MOST_THREADS)
            try:
                for picture in self._walk(groups, height, width, threads, self.index.says_unused):
                    yield picture
                    done += 1
                return
            except _OtherThanPromised:
                pass
        yield from self._from_the_beginning(indices[done:], height, width, notes)

    def _from_the_beginning(self, indices: Sequence[int], height: int, width: int, notes: Notes) -> Iterator[Picture]:
        """Decode up to the last wanted frame and count; only wanted frames are converted."""
        wanted = iter(indices)
        target = next(wanted, None)
        with opened(self.path, self.max_pixels) as container:
            decoding = Decoding(container, video_stream(container, self.path, self.max_pixels))
            shaper = Shaper(self.path, height, width, self.max_pixels)
            # AVI stores no times, and FFmpeg's guesses go back and forth with B-frames.
            has_times = container.format.name != "avi"
            number = -1
            for number, frame in enumerate(decoding.frames()):
                if number == target:
                    picture = Picture(number, shaper(frame), frame.time if has_times else None, frame.is_corrupt)
                    target = next(wanted, None)
                    notes.damaged = decoding.damaged
                    yield picture
                if target is None:
                    return
            notes.damaged, notes.frames = decoding.damaged, number + 1

    def _read_groups(
        self, index: Index, indices: Sequence[int], height: int, width: int, keep: Callable[[Picture], None]
    ) -> bool:
        """Decode groups of pictures side by side, each thread with a container of its own; False: not as promised."""
        groups, cores = index.groups(indices), _cores()
        pixels = max(1, self.info.height * self.info.width)
        workers = max(1, min(len(groups), cores, _MOST_THREADS, _PIXELS_AT_WORK // pixels))
        threads = min(max(1, cores // workers), _MOST_THREADS)
        pending = deque(groups)

        def work() -> None:
            for picture in self._walk(pending, height, width, threads, index.says_unused):
                keep(picture)

        try:
            if workers == 1:
                work()
                return True
            with ThreadPoolExecutor(workers, "mmfast-video") as pool:
                tasks = [pool.submit(work) for _ in range(workers)]
                try:
                    for task in tasks:
                        task.result()
                finally:
                    # After an error, or an interrupt, the others have nothing left to begin.
                    pending.clear()
            return True
        except _OtherThanPromised:
            return False

    def _walk(
        self, groups: deque[Group], height: int, width: int, threads: int, says_unused: bool
    ) -> Iterator[Picture]:
        """Decode groups until none is left; other threads may take from them, too."""
        with opened(self.path, self.max_pixels) as container:
            stream = video_stream(container, self.path, self.max_pixels, threads)
            shaper = Shaper(self.path, height, width, self.max_pixels)
            while groups:
                try:
                    group = groups.popleft()
                except IndexError:
                    return
                yield from _decode_group(container, stream, group, shaper, says_unused)


def _decode_group(
    container: InputContainer,
    stream: VideoStream,
    group: Group,
    shaper: Callable[[VideoFrame], Pixels],
    says_unused: bool,
) -> Iterator[Picture]:
    """Decode from a keyframe on to the last wanted frame.

    Raises:
        _OtherThanPromised: if a frame does not come in its turn, or something is damaged on the way to it.
    """
    import av

    wanted = deque(group.wanted.items())
    to_come = set(group.wanted)
    started = False
    try:
        container.seek(group.seek, stream=stream)
        for packet in container.demux(stream):
            if not started:
                started = packet.pts == group.pts and packet.is_keyframe
                if not started:
                    # Containers without times of decoding in them may end at an earlier keyframe.
                    if packet.dts is None or packet.dts <= group.pts:
                        continue
                    break
            if says_unused:
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts in to_come else "NONREF"
            if not packet.is_discard:
                to_come.discard(packet.pts)
            frames = packet.decode()
            if not to_come:
                frames += held_back(stream)
            for frame in frames:
                # What decoding starts at comes out first: the decoder knows whether it is what the container says.
                if frame.is_corrupt or (frame.pts == group.pts and not frame.key_frame):
                    raise _OtherThanPromised
                if wanted and frame.pts == wanted[0][0]:
                    yield Picture(wanted.popleft()[1], shaper(frame), frame.time)
            if not to_come:
                break
    except av.error.FFmpegError as error:
        raise _OtherThanPromised from error
    if wanted:
        raise _OtherThanPromised


class _OtherThanPromised(Exception):
    """A file in which seeking does not lead to the frames that its packets promise."""


def inspect(path: Path, max_pixels: int) -> tuple[str, str]:
    """Look at a file before another library decodes it.

    Args:
        path: video file.
        max_pixels: largest legal width x height of a frame.

    Returns:
        The names of codec and container, as FFmpeg calls them.

    Raises:
        MediaError: if there is no video stream, or its frames are too large or of unknown size.

    Example:
        >>> from mmfast.media import sample
        >>> inspect(sample("bigbuckbunny.mp4"), 10_000_000)[0]
        'h264'
    """
    with opened(path, max_pixels) as container:
        codec = video_stream(container, path, max_pixels).codec_context
        if not (codec.width and codec.height):
            raise MediaError(
                f"{path}: frames of unknown size: damaged, or larger than max_pixels={max_pixels}; "
                "give another file or raise max_pixels"
            )
        return codec.name, container.format.name


def _cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _tail_decodes(path: Path, max_pixels: int, index: Index) -> bool:
    """Whether all frames after the last keyframe of a file that was cut off come out of the decoder."""
    nothing = np.empty((0, 0, 3), np.uint8)
    with opened(path, max_pixels) as container:
        stream = video_stream(container, path, max_pixels)
        try:
            for group in index.groups(index.tail()):
                deque(_decode_group(container, stream, group, lambda frame: nothing, index.says_unused), maxlen=0)
        except _OtherThanPromised:
            return False
    return True


def _count_by_decoding(path: Path, max_pixels: int) -> tuple[int, int]:
    with opened(path, max_pixels) as container:
        decoding = Decoding(container, video_stream(container, path, max_pixels))
        return sum(1 for _ in decoding.frames()), decoding.damaged


def _rate(stream: VideoStream) -> float | None:
    for rate in (stream.average_rate, stream.guessed_rate):
        # Streams without a clock give their time base, 90,000 per second.
        if rate is not None and 0 < rate <= _FASTEST:
            return float(rate)
    return None
