"""The one error of the media room."""

from __future__ import annotations


class MediaError(ValueError):
    """An image or a video that cannot be read, or cannot be read as asked.

    The message is one line: the file, what was found, what is legal and what to do.

    Example:
        >>> raise MediaError("clip.mp4: an empty file; give a video")
        Traceback (most recent call last):
        mmfast.media.errors.MediaError: clip.mp4: an empty file; give a video
    """
