"""Which video readers work on this machine, and why the others do not."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec


def reader_states() -> dict[str, str]:
    """Say of each reader in words whether it works here.

    Example:
        >>> reader_states()["pyav"]
        'works, the default'
    """
    found = {"pyav": "works, the default" if find_spec("av") else "missing: pip install av"}
    found["decord"] = (
        "installed; used only by name, it returns wrong frames of some files"
        if find_spec("decord")
        else "not installed (optional): pip install decord"
    )
    if find_spec("torchcodec") is None:
        found["torchcodec"] = "not installed (optional): pip install torchcodec, the release that fits this torch"
        return found
    try:
        # It loads FFmpeg's libraries and a part of torch when imported, and fails where they do not fit.
        import_module("torchcodec")
    except Exception as error:
        found["torchcodec"] = f"installed but does not load ({' '.join(str(error).split())[:90]}); pyav is used instead"
    else:
        found["torchcodec"] = "works"
    return found
