"""Media for the command line, made once."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import av
import pytest
from PIL import Image

from mmfast.eval.datasets.shapes import render_clip
from mmfast.media import sample, write_video


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good and bad media."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "clip.mp4", list(render_clip(3, num_frames=8).frames), fps=8)
    Image.new("RGB", (64, 48), "grey").save(folder / "grey.png")
    Image.new("RGB", (1, 2000)).save(folder / "thin.png")
    (folder / "text.mp4").write_text("this is no video\n")
    (folder / "cut.mp4").write_bytes(sample("bigbuckbunny.mp4").read_bytes()[:20_000])
    (folder / "empty.mp4").write_bytes(b"")
    with av.open(str(folder / "frameless.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IEND", b""))
    return folder
