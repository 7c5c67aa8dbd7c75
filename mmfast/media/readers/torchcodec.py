"""torchcodec, a fast path for long files; whatever goes wrong, the caller falls back to PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfast.media.errors import MediaError
from mmfast.media.readers.base import ClipInfo, Decoded, ReadsInParts, resized
from mmfast.media.readers.pyav import inspect

# Measured with release 0.13: frames of H.264 in AVI are off by two without a word, transport streams fail.
_WRONG = {"avi", "mpegts"}


def open_with_torchcodec(path: Path, *, max_pixels: int, timeout: float = 0.0) -> TorchcodecClip:
    """Open a file with torchcodec, which scans it once (``seek_mode="exact"``).

    It needs FFmpeg's libraries on the system and the release that fits the installed torch.

    Args:
        path: video file.
        max_pixels: largest legal width x height of a frame.
        timeout: not used.

    Raises:
        MediaError: if there is no video stream, frames are too large, or torchcodec is known to return wrong
            frames for the container.
        Exception: whatever torchcodec raises, ImportError included.
    """
    from torchcodec.decoders import VideoDecoder

    # Sizes are checked by the header before torchcodec decodes anything.
    _, container = inspect(path, max_pixels)
    if container in _WRONG:
        raise MediaError(f"{path}: torchcodec returns wrong frames for {container}")
    # "approximate" guesses frames from times and is wrong for open GOPs and variable rates.
    decoder = VideoDecoder(str(path), seek_mode="exact", dimension_order="NHWC")
    height, width = decoder.get_frame_at(0).data.shape[:2]
    metadata = decoder.metadata
    info = ClipInfo(str(path), int(metadata.num_frames), float(metadata.average_fps), height, width)
    return TorchcodecClip(decoder, info)


@dataclass(frozen=True)
class TorchcodecClip(ReadsInParts):
    """A file that torchcodec has open.

    Attributes:
        decoder: its ``VideoDecoder``.
        info: what was found when it was opened.
    """

    decoder: Any
    info: ClipInfo

    def read(self, indices: Sequence[int], height: int, width: int) -> Decoded:
        """Decode frame by frame, so that no two full-size frames are held at once."""
        frames = np.empty((len(indices), height, width, 3), np.uint8)
        start = float(self.decoder.get_frame_at(0).pts_seconds)
        times = []
        for place, index in enumerate(indices):
            frame = self.decoder.get_frame_at(index)
            frames[place] = resized(frame.data.numpy(), height, width)
            times.append(float(frame.pts_seconds) - start)
        return Decoded(frames, tuple(times), self.info.total_frames)
