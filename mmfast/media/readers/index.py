"""Where the frames of a file lie, learnt from its packets without decoding them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av import Packet
    from av.video.stream import VideoStream

# Elsewhere packets and frames do not correspond, times are guessed, or seeking ends at another place: AVI, transport
# and program streams.
_CONTAINERS = ("mov,mp4", "matroska")
# Codecs whose keyframes are known to start anew.
_CODECS = {"h264", "hevc", "vp9", "av1", "libdav1d", "mpeg4", "mjpeg", "prores"}
# Codecs in which a picture that says so is never referred to: HEVC means only its own temporal layer by it.
_SAYS_UNUSED = {"h264"}
# Decoding this many packets costs less than seeking.
_NEAR = 8


@dataclass(frozen=True)
class Group:
    """Frames that are decoded in one go, from a keyframe on.

    Attributes:
        pts: presentation time of the keyframe, in the time base of the stream.
        seek: where to seek for it: containers go by presentation or by decoding time, this is the earlier one.
        wanted: presentation time -> number of the frame, in the order of display.
    """

    pts: int
    seek: int
    wanted: dict[int, int]


@dataclass(frozen=True, eq=False)
class Index:
    """The packets of a file in which each shown packet is one frame.

    Attributes:
        pts: int64 ``[M]``, presentation times of the shown frames, ascending.
        place: int64 ``[M]``, where in the file the packet of each of them is, counted in packets.
        start_place: int64 ``[K]``, where the packets are from which decoding can start, ascending.
        start_pts: int64 ``[K]``, their presentation times.
        start_seek: int64 ``[K]``, the earlier of presentation and decoding time.
        says_unused: whether the decoder may leave out, bit for bit the same, pictures that no other refers to.
    """

    pts: NDArray[np.int64]
    place: NDArray[np.int64]
    start_place: NDArray[np.int64]
    start_pts: NDArray[np.int64]
    start_seek: NDArray[np.int64]
    says_unused: bool

    def groups(self, numbers: Sequence[int]) -> list[Group]:
        """Sort frame numbers, ascending, by the keyframe that decoding them starts at."""
        groups: list[Group] = []
        first = last = -1
        for number in numbers:
            pts, place = int(self.pts[number]), int(self.place[number])
            start = self._start(pts, place)
            # Reading on is exact as well, and cheaper than seeking to a keyframe that comes soon.
            if groups and start >= first and (start == first or self.start_place[start] - last <= _NEAR):
                groups[-1].wanted[pts] = number
            else:
                groups.append(Group(int(self.start_pts[start]), int(self.start_seek[start]), {pts: number}))
                first = start
            last = max(last, place)
        return groups

    def tail(self) -> range:
        """Numbers of the frames that the last keyframe, and what follows it in the file, is needed for."""
        return range(int(np.searchsorted(self.pts, self.start_pts[-1])), len(self.pts))

    def _start(self, pts: int, place: int) -> int:
        """Find the last keyframe that neither follows the frame in the file nor is shown after it."""
        start = int(np.searchsorted(self.start_place, place, side="right")) - 1
        # A frame that follows a keyframe in the file but is shown before it may need the pictures before that.
        while start > 0 and self.start_pts[start] > pts:
            start -= 1
        return start


class PacketTable:
    """What is remembered of each packet that passes.

    Attributes:
        hidden: how many of them the container marks as not to be shown.
        starts_clean: whether the first packet is a keyframe and no later one is shown before it.
    """

    def __init__(self, codec: str, extradata: bytes) -> None:
        self.hidden = 0
        self.starts_clean = True
        self._codec = codec
        # The first bytes of an MP4's or Matroska's header say how long the length before each unit is.
        self._length_bytes = _length_bytes(codec, extradata)
        self._timed = True
        self._pts, self._shown = array("q"), array("b")
        self._starts, self._seeks = array("q"), array("q")

    def __len__(self) -> int:
        return len(self._pts)

    @property
    def shown(self) -> int:
        """Packets that are to be shown."""
        return len(self) - self.hidden

    def add(self, packet: Packet[VideoStream]) -> None:
        """Take note of a packet that is not empty."""
        shown = not packet.is_discard
        if not len(self):
            self.starts_clean = packet.is_keyframe
        elif shown and self._timed and packet.pts is not None:
            self.starts_clean &= packet.pts >= self._pts[0]
        self._timed &= packet.pts is not None
        if packet.is_keyframe and self._can_start(packet):
            self._starts.append(len(self))
            times = [time for time in (packet.pts, packet.dts) if time is not None]
            self._seeks.append(min(times, default=0))
        self._pts.append(packet.pts or 0)
        self._shown.append(shown)
        self.hidden += not shown

    def index(self, container: str, first_pts: int | None) -> Index | None:
        """Build the index, or return None if single frames cannot be found by it.

        Args:
            container: FFmpeg's name of the format.
            first_pts: presentation time of the first frame that came out of the decoder.
        """
        usable = self._timed and self.starts_clean and self._starts and self._starts[0] == 0
        if not (usable and self._codec in _CODECS and container.startswith(_CONTAINERS)):
            return None
        pts, starts, seeks = (np.array(kept, np.int64) for kept in (self._pts, self._starts, self._seeks))
        place = np.flatnonzero(np.array(self._shown))
        place = place[np.argsort(pts[place], kind="stable")]
        times = pts[place]
        # A time that occurs twice does not tell which frame is meant.
        if not len(times) or times[0] != first_pts or (np.diff(times) <= 0).any() or (np.diff(pts[starts]) <= 0).any():
            return None
        return Index(times, place, starts, pts[starts], seeks, self._codec in _SAYS_UNUSED)

    def _can_start(self, packet: Packet[VideoStream]) -> bool:
        """Ask the bits, where files are known to call pictures keyframes that need pictures before them."""
        if self._codec == "h264":
            return _h264_starts(bytes(packet), self._length_bytes)
        if self._codec == "hevc":
            return _hevc_starts(bytes(packet), self._length_bytes)
        return True


def _length_bytes(codec: str, extradata: bytes) -> int:
    """Bytes of the length before each unit; 0: start codes stand between units."""
    place = {"h264": 4, "hevc": 21}.get(codec)
    if place is None or len(extradata) <= place or extradata[0] != 1:
        return 0
    return (extradata[place] & 3) + 1


def _units(data: bytes, length_bytes: int) -> Iterator[bytes]:
    """Cut a packet of H.264 or HEVC into its units."""
    if not length_bytes:
        yield from (unit for unit in data.split(b"\0\0\1") if unit)
        return
    at = 0
    while at + length_bytes < len(data):
        end = at + length_bytes + int.from_bytes(data[at : at + length_bytes], "big")
        yield data[at + length_bytes : end]
        at = end


def _h264_starts(data: bytes, length_bytes: int) -> bool:
    """Whether it holds an IDR picture, or says that all is exact from here on (as with open groups of pictures)."""
    for unit in _units(data, length_bytes):
        kind = unit[0] & 31 if unit else 0
        if kind == 5 or (kind == 6 and _exact_at_once(unit)):
            return True
        if kind == 1:
            return False
    return False


def _exact_at_once(unit: bytes) -> bool:
    """Whether supplemental information holds a recovery point, zero frames away, with an exact match."""
    at = 1
    while at + 2 < len(unit):
        numbers = []
        # Type and size, each a sum of bytes of which the last is not 255.
        for _ in range(2):
            total = 0
            while at < len(unit) and unit[at] == 255:
                total, at = total + 255, at + 1
            if at >= len(unit):
                return False
            numbers.append(total + unit[at])
            at += 1
        kind, size = numbers
        if kind == 6:
            # Zero is written as one set bit; the next one promises the exact match.
            return at < len(unit) and unit[at] >> 6 == 3
        at += size
    return False


def _hevc_starts(data: bytes, length_bytes: int) -> bool:
    """Whether its first picture is a random access point."""
    kinds = (unit[0] >> 1 & 63 for unit in _units(data, length_bytes) if unit)
    return 16 <= next((kind for kind in kinds if kind < 32), 0) <= 21
