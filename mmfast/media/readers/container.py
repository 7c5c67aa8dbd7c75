"""What FFmpeg makes of a file: its container, the packets in it, and the frames in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmfast.media.errors import MediaError
from mmfast.media.image import check_shape
from mmfast.media.readers.base import Pixels
from mmfast.media.readers.index import PacketTable
from mmfast.media.sniff import VIDEOS

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Playlists and scripts, which could make FFmpeg read other files or the network, are not among them.
_OPTIONS = {"format_whitelist": "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg", "protocol_whitelist": "file"}


def opened(path: Path, max_pixels: int) -> InputContainer:
    """Open a file with FFmpeg.

    Raises:
        MediaError: if FFmpeg sees no video file in it.

    Example:
        >>> from mmfast.media import sample
        >>> with opened(sample("bigbuckbunny.mp4"), 10_000_000) as container:
        ...     container.streams.video[0].codec_context.name
        'h264'
    """
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


def video_stream(container: InputContainer, path: Path, max_pixels: int, threads: int = 0) -> VideoStream:
    """Find the first stream of moving pictures, and check its size before anything is decoded.

    Args:
        container: an open file.
        path: its path, for messages.
        max_pixels: largest legal width x height of a frame.
        threads: threads of the decoder; 0 leaves it to FFmpeg.

    Raises:
        MediaError: if there is none, its codec is unknown, or its frames are too large.

    Example:
        >>> from mmfast.media import sample
        >>> path = sample("bigbuckbunny.mp4")
        >>> with opened(path, 10_000_000) as container:
        ...     video_stream(container, path, 10_000_000).frames
        132
    """
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
        stream.thread_count = threads
        return stream
    kinds = sorted({stream.type.replace("video", "a cover picture") for stream in container.streams})
    what = f"only {' and '.join(kinds)}" if kinds else "no stream at all: empty, or cut off before its index"
    raise MediaError(f"{path}: {what}; give a file with a video stream")


class Decoding:
    """Decodes as much of a stream as can be decoded, from the beginning, and remembers what passed.

    Attributes:
        packets: the packets so far, damaged ones left out.
        damaged: packets that could not be read or decoded.
        only_cut_off: whether nothing came after the first of them.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.packets = PacketTable(stream.codec_context.name, bytes(stream.codec_context.extradata or b""))
        self.damaged = 0
        self.only_cut_off = True
        self._stream = stream
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
            yield from held_back(self._stream)
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
                self.only_cut_off &= not self.damaged
                self.packets.add(packet)
            yield packet


def held_back(stream: VideoStream) -> list[VideoFrame]:
    """Return the frames that the decoder holds back for reordering; it takes no more packets until a seek."""
    frames = stream.codec_context.decode(None)
    for frame in frames:
        frame.time_base = stream.time_base
    return frames


class Shaper:
    """Brings frames to RGB, upright and of one size, before anything of them is kept.

    Args:
        path: the file, for messages.
        height: wanted height, of the upright frame.
        width: wanted width.
        max_pixels: largest legal width x height of a decoded frame.
    """

    def __init__(self, path: Path, height: int, width: int, max_pixels: int) -> None:
        from av.video.reformatter import VideoReformatter

        self.path = path
        self.height, self.width = height, width
        self.max_pixels = max_pixels
        # Sets its tables up once, for all frames of a size.
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> Pixels:
        """Convert a frame; the display matrix turns it, ``rotation`` counts counter-clockwise.

        Returns:
            uint8 ``[height, width, 3]``.

        Raises:
            MediaError: if it is too large, or its colours cannot be converted.
        """
        from av.video.reformatter import Interpolation

        check_shape(str(self.path), frame.width, frame.height, self.max_pixels)
        turns = round(frame.rotation / 90) % 4
        height, width = (self.width, self.height) if turns % 2 else (self.height, self.width)
        same = (frame.height, frame.width) == (height, width)
        bicubic = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        # Bicubic here averages over all pixels that fall into one, so that nothing flickers when made small.
        return np.rot90(self._rgb(frame, height, width, Interpolation.BILINEAR if same else bicubic), turns)

    def _rgb(self, frame: VideoFrame, height: int, width: int, interpolation: int) -> Pixels:
        import av

        try:
            # One thread: several frames are under way at once, and FFmpeg would start new ones for each.
            made = self._reformatter.reformat(
                frame, width=width, height=height, format="rgb24", interpolation=interpolation, threads=1
            )
            return np.asarray(made.to_ndarray(), np.uint8)
        except (av.error.FFmpegError, ValueError) as error:
            raise MediaError(
                f"{self.path}: frames of this colour space ({frame.format.name}) cannot be converted to RGB "
                f"({error}); save it as BT.709"
            ) from error
