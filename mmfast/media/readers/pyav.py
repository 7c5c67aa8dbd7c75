"""PyAV, the default reader: decodes from the first frame on and counts, which is right for every container.

Seeking is what goes wrong elsewhere (open GOPs, B-frames in AVI, transport streams), so nothing here seeks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmfast.media.errors import MediaError
from mmfast.media.image import check_shape
from mmfast.media.readers.base import FALLBACK_FPS, ClipInfo, Decoded, Pixels, resized, shortened
from mmfast.media.sniff import VIDEOS

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Playlists and scripts, which could make FFmpeg read other files or the network, are not among them.
_OPTIONS = {"format_whitelist": "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg", "protocol_whitelist": "file"}

# Packets of VP8 may hold frames that are never shown.
_HIDES_FRAMES = {"vp8"}

_FASTEST = 1000.0


def open_with_pyav(path: Path, *, max_pixels: int, timeout: float = 0.0) -> PyavClip:
    """Open a file with PyAV: count its frames and decode the first one.

    Frames are counted by their packets, without decoding. Where packets and frames may differ (a damaged
    file, one that starts between keyframes, hidden frames) all frames are decoded to count them.

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
    return PyavClip(path, max_pixels, _survey(path, max_pixels))


@dataclass(frozen=True)
class PyavClip:
    """A file that PyAV can decode; each read starts at the beginning.

    Attributes:
        path: the file.
        max_pixels: largest legal width x height of a frame.
        info: what was found when it was opened.
    """

    path: Path
    max_pixels: int
    info: ClipInfo

    def read(self, indices: Sequence[int], height: int, width: int) -> Decoded:
        """Decode up to the last wanted frame; only wanted frames are converted, resized and kept."""
        frames = np.empty((len(indices), height, width, 3), np.uint8)
        times: list[float] = []
        doubtful: list[int] = []
        count, start = 0, None
        with _opened(self.path, self.max_pixels) as container:
            decoding = _Decoding(container, _video_stream(container, self.path, self.max_pixels))
            # AVI stores no times, and FFmpeg's guesses go back and forth with B-frames.
            has_times = container.format.name != "avi"
            for frame in decoding.frames():
                start = frame.time if start is None else start
                if count == indices[len(times)]:
                    check_shape(str(self.path), frame.width, frame.height, self.max_pixels)
                    frames[len(times)] = resized(_upright(frame, self.path), height, width)
                    time = count / self.info.fps
                    if has_times and frame.time is not None and start is not None:
                        since = frame.time - start
                        # The clock jumps back where recordings were joined.
                        time = since if not times or since > times[-1] else time
                    times.append(time)
                    if frame.is_corrupt:
                        doubtful.append(count)
                count += 1
                if len(times) == len(indices):
                    count = self.info.total_frames
                    break
        warnings = []
        if decoding.damaged and not self.info.warnings:
            warnings.append(f"{self.path}: {decoding.damaged} damaged parts: frames may be missing or wrong there")
        if doubtful:
            warnings.append(f"{self.path}: decoded from damaged data: frames {shortened(doubtful)}")
        return Decoded(frames[: len(times)], tuple(times), count, tuple(warnings))


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
    with _opened(path, max_pixels) as container:
        stream = _video_stream(container, path, max_pixels)
        codec = stream.codec_context
        if not (codec.width and codec.height):
            raise MediaError(
                f"{path}: frames of unknown size: damaged, or larger than max_pixels={max_pixels}; "
                "give another file or raise max_pixels"
            )
        return codec.name, container.format.name


def _opened(path: Path, max_pixels: int) -> InputContainer:
    import av

    # FFmpeg decodes a little when it opens a file, and a header may lie: so every decoder has a limit. It is
    # twice as high because decoders count padding too; the exact one is checked afterwards.
    options = {**_OPTIONS, "max_pixels": str(2 * max_pixels)}
    try:
        # Tags may hold any bytes; none of them is used.
        return av.open(str(path), options=options, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise MediaError(
            f"{path}: no readable video ({error.strerror or error}); its index may be cut off or it is "
            f"another format; give {VIDEOS}"
        ) from error


def _video_stream(container: InputContainer, path: Path, max_pixels: int) -> VideoStream:
    """Find the first stream of moving pictures, and check its size before anything is decoded."""
    import av

    cover = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if stream.disposition & cover:
            continue
        codec = stream.codec_context
        if codec is None:
            raise MediaError(f"{path}: a video of a codec without a decoder here; convert it to H.264")
        if codec.width and codec.height:
            check_shape(str(path), codec.width, codec.height, max_pixels)
        codec.options = {"max_pixels": str(2 * max_pixels)}
        stream.thread_type = "AUTO"
        return stream
    kinds = sorted({stream.type.replace("video", "a cover picture") for stream in container.streams})
    what = f"only {' and '.join(kinds)}" if kinds else "no stream at all: empty, or cut off before its index"
    raise MediaError(f"{path}: {what}; give a file with a video stream")


class _Decoding:
    """Decodes as much of a stream as can be decoded, and remembers what passed.

    Attributes:
        packets: packets so far, damaged ones left out.
        hidden: how many of them the container marks as not to be shown.
        damaged: packets that could not be read or decoded.
        starts_clean: whether the first packet is a keyframe and no later one is shown before it.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.packets = 0
        self.hidden = 0
        self.damaged = 0
        self.starts_clean = True
        self._stream = stream
        self._first_pts: int | None = None
        self._remaining = self._demux(container, stream)

    def frames(self) -> Iterator[VideoFrame]:
        """Decode what remains, in the order of display."""
        import av

        for packet in self._remaining:
            try:
                yield from packet.decode()
            except av.error.FFmpegError:
                self.damaged += 1
        # Only does something when demuxing broke off: after a proper end the last, empty packet did the same.
        try:
            for frame in self._stream.codec_context.decode(None):
                frame.time_base = self._stream.time_base
                yield frame
        except av.error.FFmpegError:
            return

    def skip_to_end(self) -> None:
        """Read what remains without decoding."""
        for _ in self._remaining:
            pass

    def _demux(self, container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
        import av

        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (av.error.FFmpegError, IndexError):
                # IndexError: PyAV stumbles over streams that turn up in the middle of a file.
                self.damaged += 1
                return
            if packet.is_corrupt:
                self.damaged += 1
                # Elsewhere it is the last packet of a file that was cut off: half of its picture would be grey.
                # In transport streams a number is missing somewhere, and the picture is mostly whole.
                if container.format.name != "mpegts":
                    continue
            if packet.size:
                self._note(packet)
            yield packet

    def _note(self, packet: Packet[VideoStream]) -> None:
        if self.packets == 0:
            self.starts_clean = packet.is_keyframe
            self._first_pts = packet.pts
        elif packet.pts is not None and self._first_pts is not None and not packet.is_discard:
            self.starts_clean &= packet.pts >= self._first_pts
        self.packets += 1
        self.hidden += packet.is_discard


def _survey(path: Path, max_pixels: int) -> ClipInfo:
    with _opened(path, max_pixels) as container:
        stream = _video_stream(container, path, max_pixels)
        decoding = _Decoding(container, stream)
        first = next(decoding.frames(), None)
        what = f"{stream.codec_context.name} video in {container.format.name}"
        if first is None:
            raise MediaError(
                f"{path}: {what} of which no frame can be decoded: damaged, or larger than "
                f"max_pixels={max_pixels}; give another file or raise max_pixels"
            )
        height, width = _upright(first, path).shape[:2]
        decoding.skip_to_end()
        promised, codec, rate = stream.frames, stream.codec_context.name, _rate(stream)
    total = decoding.packets - decoding.hidden
    if decoding.damaged or not decoding.starts_clean or codec in _HIDES_FRAMES:
        total, decoding.damaged = _count_by_decoding(path, max_pixels)
    warnings = []
    # With an edit list FFmpeg hides some packets and leaves others out: then fewer frames are no damage.
    if total < promised and (decoding.damaged or not decoding.hidden):
        warnings.append(f"{path}: {what} promises {promised} frames, {total} can be decoded: cut off or damaged")
    elif decoding.damaged:
        warnings.append(f"{path}: {what} has {decoding.damaged} damaged parts: frames may be missing or wrong there")
    if rate is None:
        warnings.append(f"{path}: no frame rate in the file; {FALLBACK_FPS:g} per second assumed")
    return ClipInfo(str(path), total, rate or FALLBACK_FPS, height, width, tuple(warnings))


def _count_by_decoding(path: Path, max_pixels: int) -> tuple[int, int]:
    with _opened(path, max_pixels) as container:
        decoding = _Decoding(container, _video_stream(container, path, max_pixels))
        return sum(1 for _ in decoding.frames()), decoding.damaged


def _rate(stream: VideoStream) -> float | None:
    for rate in (stream.average_rate, stream.guessed_rate):
        # Streams without a clock give their time base, 90,000 per second.
        if rate is not None and 0 < rate <= _FASTEST:
            return float(rate)
    return None


def _upright(frame: VideoFrame, path: Path) -> Pixels:
    """Convert to RGB and turn as the file's display matrix says; ``rotation`` counts counter-clockwise."""
    import av

    try:
        pixels = frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError(
            f"{path}: frames of this colour space ({frame.format.name}) cannot be converted to RGB ({error}); "
            "save it as BT.709"
        ) from error
    return np.rot90(pixels, round(frame.rotation / 90) % 4)
