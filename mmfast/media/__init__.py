"""Reading images and videos, from the file to RGB pixels, working ahead, and writing clips.

>>> from mmfast.media import load_image, sample
>>> load_image(sample("coffee.jpg")).size
(600, 400)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfast.media.clips import video_clips
    from mmfast.media.errors import MediaError
    from mmfast.media.image import load_image
    from mmfast.media.prefetch import Prefetched, prefetched
    from mmfast.media.samples import sample
    from mmfast.media.sampling import SAMPLERS, choose_frames
    from mmfast.media.sniff import is_image, is_video, kind_of
    from mmfast.media.video import Video, read_video
    from mmfast.media.write import write_video

_HOME = {
    "SAMPLERS": "sampling",
    "MediaError": "errors",
    "Prefetched": "prefetch",
    "Video": "video",
    "choose_frames": "sampling",
    "is_image": "sniff",
    "is_video": "sniff",
    "kind_of": "sniff",
    "load_image": "image",
    "prefetched": "prefetch",
    "read_video": "video",
    "sample": "samples",
    "video_clips": "clips",
    "write_video": "write",
}

__all__ = [
    "SAMPLERS",
    "MediaError",
    "Prefetched",
    "Video",
    "choose_frames",
    "is_image",
    "is_video",
    "kind_of",
    "load_image",
    "prefetched",
    "read_video",
    "sample",
    "video_clips",
    "write_video",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that this package costs nothing until then."""
    if name not in _HOME:
        raise AttributeError(f"module 'mmfast.media' has no attribute {name!r}")
    value = getattr(import_module(f"mmfast.media.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
