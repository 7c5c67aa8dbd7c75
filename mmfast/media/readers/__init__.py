"""The video readers by name: one file each, one interface (:class:`mmfast.media.readers.base.Reader`)."""

from __future__ import annotations

from mmfast.media.readers.base import Clip, ClipInfo, Decoded, Reader
from mmfast.media.readers.decord import open_with_decord
from mmfast.media.readers.pyav import open_with_pyav
from mmfast.media.readers.torchcodec import open_with_torchcodec

__all__ = ["READERS", "Clip", "ClipInfo", "Decoded", "Reader"]

READERS: dict[str, Reader] = {
    "pyav": open_with_pyav,
    "decord": open_with_decord,
    "torchcodec": open_with_torchcodec,
}
