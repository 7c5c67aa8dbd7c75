"""Which video readers work on this machine, and why the others do not."""

from __future__ import annotations

from importlib.util import find_spec

from mmfast.media.samples import sample
from mmfast.media.video import read_video

_SAMPLE = "bigbuckbunny.mp4"
_SECONDS = 30.0

# Reader -> its package, what to say where it works, and how to get it.
_READERS = {
    "pyav": ("av", "works, the default", "missing: pip install av"),
    "decord": (
        "decord",
        "works; used only by name, it returns wrong frames of some files",
        "not installed (optional): pip install decord",
    ),
    "torchcodec": (
        "torchcodec",
        "works",
        "not installed (optional): pip install torchcodec, the release that fits this torch; it needs FFmpeg",
    ),
}


def reader_states() -> dict[str, str]:
    """Say of each reader in words whether it works here; those installed have to read a frame.

    Example:
        >>> reader_states()["pyav"]
        'works, the default'
    """
    return {
        reader: _trial(reader, works) if find_spec(package) else missing
        for reader, (package, works, missing) in _READERS.items()
    }


def _trial(reader: str, works: str) -> str:
    # Installed says little: torchcodec does not load where torch or FFmpeg do not fit, decord may crash.
    try:
        video = read_video(sample(_SAMPLE), indices=[0], size=32, reader=reader, timeout=_SECONDS)
    except Exception as error:
        return f"installed, but does not work: {' '.join(str(error).split())[:160]}"
    return works if video.reader == reader else f"installed, but does not work: {'; '.join(video.warnings)[:160]}"
