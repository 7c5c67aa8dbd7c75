"""Clips made at test time, each frame carrying its number as eight large black or white blocks."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

WIDTH, HEIGHT, FRAMES, FPS = 96, 64, 48, 30
MILLISECOND = Fraction(1, 1000)

# name: (suffix, encoder, options, time of a frame in ms or None for a constant rate)
CLIPS = {
    "h264-closed-gop": (".mp4", "libx264", {"x264-params": "keyint=12:bframes=3:open-gop=0"}, None),
    "h264-open-gop": (".mp4", "libx264", {"x264-params": "keyint=12:bframes=3:open-gop=1:scenecut=0"}, None),
    "hevc": (".mp4", "libx265", {"x265-params": "keyint=12:log-level=none:pools=1", "preset": "ultrafast"}, None),
    "vp8": (".webm", "libvpx", {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0"}, None),
    "vp9": (".webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "12"}, None),
    "transport-stream": (".ts", "libx264", {"x264-params": "keyint=12:bframes=3"}, None),
    "avi-b-frames": (".avi", "mpeg4", {"g": "12", "bf": "2", "qscale": "2"}, None),
    "avi-h264": (".avi", "libx264", {"x264-params": "keyint=12:bframes=3"}, None),
    "mkv": (".mkv", "libx264", {"x264-params": "keyint=12:bframes=3"}, None),
    "variable-rate": (".mp4", "libx264", {"x264-params": "keyint=12"}, lambda n: 20 * n + 77 * (n // 10)),
    "starts-at-5s": (".mkv", "libx264", {"x264-params": "keyint=12"}, lambda n: 5000 + 40 * n),
}


class Clips:
    """Makes and reads numbered frames."""

    width, height, frames, fps = WIDTH, HEIGHT, FRAMES, FPS
    names = tuple(CLIPS)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def numbered(number: int) -> np.ndarray:
        frame = np.empty((HEIGHT, WIDTH, 3), np.uint8)
        for bit in range(8):
            row, column = divmod(bit, 4)
            frame[row * 32 : row * 32 + 32, column * 24 : column * 24 + 24] = 235 if number >> bit & 1 else 20
        return frame

    @staticmethod
    def number(frame: np.ndarray) -> int:
        """Read the number, whatever the size of the frame."""
        height, width = frame.shape[0] / 2, frame.shape[1] / 4
        number = 0
        for bit in range(8):
            row, column = divmod(bit, 4)
            block = frame[
                round((row + 0.25) * height) : round((row + 0.75) * height),
                round((column + 0.25) * width) : round((column + 0.75) * width),
            ]
            number |= int(block.mean() > 128) << bit
        return number

    def numbers(self, frames: np.ndarray) -> list[int]:
        return [self.number(frame) for frame in frames]

    @staticmethod
    def milliseconds(name: str, number: int) -> float:
        """Time of a frame since the first one."""
        clock = CLIPS[name][3]
        return clock(number) - clock(0) if clock else 1000 * number / FPS

    def get(self, name: str) -> Path:
        """One of ``CLIPS``, made once."""
        suffix, encoder, options, clock = CLIPS[name]
        path = self.folder / f"{name}{suffix}"
        if not path.exists():
            self.make(path, encoder, options, clock=clock)
        return path

    def make(
        self,
        path: Path,
        encoder="libx264",
        options=None,
        *,
        clock=None,
        frames=FRAMES,
        container=None,
        rate=FPS,
        pixels="yuv420p",
    ) -> Path:
        if encoder not in av.codec.codecs_available:
            pytest.skip(f"this FFmpeg has no encoder {encoder}")
        pictures = frames if isinstance(frames, Sequence) else [self.numbered(n) for n in range(frames)]
        with av.open(str(path), "w", options=container or {}) as out:
            stream = out.add_stream(encoder, rate=rate, options=options or {})
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = pixels
            tick = MILLISECOND if clock else Fraction(1, rate)
            stream.codec_context.time_base = tick
            for n, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = clock(n) if clock else n, tick
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        return path

    def ends_in_nonsense(self, path: Path) -> Path:
        """A clip whose container is intact, so that packets are counted, but whose last three cannot be decoded."""
        data = bytearray(self.make(path, options={"g": "12", "bf": "0"}).read_bytes())
        with av.open(str(path)) as container:
            packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
        for start, size in packets[-3:]:
            data[start : start + size] = b"\xff" * size
        path.write_bytes(data)
        return path

    @staticmethod
    def rotated(source: Path, target: Path, degrees: int) -> Path:
        """Write the matrix that tells players to turn the picture clockwise into an MP4's track header."""
        data = bytearray(source.read_bytes())
        a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
        matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
        struct.pack_into(">9i", data, data.index(b"tkhd") + 44, *matrix)
        target.write_bytes(data)
        return target

    @staticmethod
    def png(width: int, height: int, *, complete: bool = True) -> bytes:
        """A black PNG; if not complete, only the header tells its size and the pixels are missing."""

        def chunk(kind: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        pixels = zlib.compress(bytes((3 * width + 1) * height if complete else 1000))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")

    def png_clip(self, path: Path, picture: bytes) -> Path:
        """A clip of 64x64 pixels by its header, whose only frame is the given PNG."""
        with av.open(str(path), "w") as out:
            stream = out.add_stream("png", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb24"
            out.start_encoding()
            packet = av.Packet(picture)
            packet.pts = packet.dts = 0
            packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, FPS), True, stream
            out.mux(packet)
        return path

    @staticmethod
    def noisy(frames: int, height: int = 64, width: int = 96) -> list[np.ndarray]:
        """Pictures that do not compress, so that half a file holds about half the frames."""
        generator = np.random.default_rng(0)
        return list(generator.integers(0, 255, (frames, height, width, 3), dtype=np.uint8))

    @staticmethod
    def damaged(data: bytes, seed: int) -> bytes:
        """Cut the data off, or overwrite some bytes."""
        chance = random.Random(seed)
        if seed % 3 == 0:
            return data[: chance.randrange(1, len(data))]
        broken = bytearray(data)
        for _ in range(chance.choice((1, 4, 30))):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        return bytes(broken)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    return Clips(tmp_path_factory.mktemp("clips"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``clip_name`` runs a test for each of the clips."""
    if "clip_name" in metafunc.fixturenames:
        metafunc.parametrize("clip_name", CLIPS)
