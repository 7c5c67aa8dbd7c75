"""What a file holds, told from its first bytes: a name can lie."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmfast.media.errors import MediaError

IMAGES = "PNG, JPEG, WEBP, BMP, GIF or TIFF"
VIDEOS = "MP4/MOV, MKV/WEBM, AVI, MPEG-TS/PS, FLV, ASF or OGG"

HEAD_BYTES = 1024

# (offset, bytes, name, kind). First match wins.
_SIGNATURES: tuple[tuple[int, bytes, str, Literal["image", "video", "array", "other"]], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG", "image"),
    (0, b"\xff\xd8\xff", "JPEG", "image"),
    (0, b"BM", "BMP", "image"),
    (0, b"GIF87a", "GIF", "image"),
    (0, b"GIF89a", "GIF", "image"),
    (0, b"II*\x00", "TIFF", "image"),
    (0, b"MM\x00*", "TIFF", "image"),
    (8, b"WEBP", "WEBP", "image"),
    (8, b"AVI ", "AVI", "video"),
    (8, b"WAVE", "WAV audio", "other"),
    (0, b"\x1aE\xdf\xa3", "MKV/WEBM", "video"),
    (0, b"FLV\x01", "FLV", "video"),
    (0, b"\x00\x00\x01\xba", "MPEG-PS", "video"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "ASF", "video"),
    (0, b"OggS", "OGG", "video"),
    (0, b"\x93NUMPY", "NPY", "array"),
    (4, b"ftypavif", "AVIF", "other"),
    (4, b"ftypavis", "AVIF", "other"),
    (4, b"ftyphei", "HEIC", "other"),
    (4, b"ftypmif1", "HEIF", "other"),
    (4, b"ftypM4A", "M4A audio", "other"),
    (0, b"ID3", "MP3 audio", "other"),
    (0, b"fLaC", "FLAC audio", "other"),
    (0, b"%PDF-", "PDF", "other"),
    (0, b"PK\x03\x04", "ZIP", "other"),
    (0, b"version https://git-lfs", "Git LFS pointer, not the file itself", "other"),
    *((4, box, "MP4/MOV", "video") for box in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"pnot")),
)


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        name: the format, ``"PNG"``, ``"MP4/MOV"``, ``"text"``...
        kind: ``image`` and ``video`` have their readers, ``array`` is a NumPy file, ``other`` is not read.
    """

    name: str
    kind: Literal["image", "video", "array", "other"]


def content_of(head: bytes) -> Content:
    r"""Tell the format from the first bytes of a file.

    Args:
        head: the first ``HEAD_BYTES`` bytes, or all if there are fewer.

    Example:
        >>> content_of(b"\x89PNG\r\n\x1a\n...").name
        'PNG'
        >>> content_of(b"hello")
        Content(name='text', kind='other')
    """
    for offset, signature, name, kind in _SIGNATURES:
        if head.startswith(signature, offset):
            # RIFF is the outer wrapper of WEBP, AVI and WAV; without it the four letters are chance.
            if offset == 8 and not head.startswith(b"RIFF"):
                continue
            return Content(name, kind)
    # Transport streams have a sync byte every 188 bytes, on Blu-ray after a 4-byte time code.
    if any(head[start : start + 2 * step + 1 : step] == b"GGG" for start, step in ((0, 188), (4, 192))):
        return Content("MPEG-TS", "video")
    return Content(_name_of_unknown(head), "other")


def _name_of_unknown(head: bytes) -> str:
    if not head:
        return "an empty file"
    if head.lstrip()[:9].lower() in (b"<!doctype", b"<html>") or head.lstrip()[:5].lower() == b"<html":
        return "a web page"
    # A multi-byte letter may be cut at the end of the head, so that the last bytes do not count.
    text = head[: max(1, len(head) - 3)]
    try:
        text.decode()
    except UnicodeDecodeError:
        return "an unknown format"
    return "text" if b"\x00" not in text else "an unknown format"


def check_file(path: Path, *, max_bytes: int | None = None) -> Content:
    """Look at a file's size and first bytes.

    Args:
        path: the file.
        max_bytes: largest legal size.

    Returns:
        What the file holds.

    Raises:
        MediaError: if the file is missing, no plain file, unreadable or too large.

    Example:
        >>> check_file(Path("missing.png"))
        Traceback (most recent call last):
        mmfast.media.errors.MediaError: missing.png: no such file; check the path
    """
    if not path.exists():
        hint = (
            "download it first, addresses are not fetched"
            if "://" in str(path) or ":/" in str(path)
            else "check the path"
        )
        raise MediaError(f"{path}: no such file; {hint}")
    # A pipe or a device could block for ever.
    if not path.is_file():
        raise MediaError(f"{path}: {'a folder' if path.is_dir() else 'a pipe or device'}; give a plain file")
    size = path.stat().st_size
    if max_bytes is not None and size > max_bytes:
        raise MediaError(
            f"{path}: {size} bytes are more than max_bytes={max_bytes}; give a smaller one or raise max_bytes"
        )
    try:
        with path.open("rb") as file:
            return content_of(file.read(HEAD_BYTES))
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def folder_images(folder: Path) -> list[Path]:
    """List the images of a folder by content, numbers in their names counted as numbers.

    Raises:
        MediaError: if the folder holds no image.
    """
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    images = [path for path in files if check_file(path).kind == "image"]
    if not images:
        raise MediaError(f"{folder}: a folder without images; give one that holds {IMAGES} files")
    return sorted(images, key=_natural_key)


def _natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort frame2 before frame10."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]


def kind_of(path: str | os.PathLike[str]) -> Literal["image", "video"]:
    """Tell from its content whether a path is an image or a video.

    A folder of images and a NumPy file are videos; an animated GIF is an image (its first frame).

    Args:
        path: a file or folder.

    Raises:
        MediaError: if it is neither.

    Example:
        >>> from mmfast.media import sample
        >>> kind_of(sample("coffee.jpg")), kind_of(sample("bigbuckbunny.mp4"))
        ('image', 'video')
    """
    path = Path(path)
    if path.is_dir():
        folder_images(path)
        return "video"
    content = check_file(path)
    if content.kind == "other":
        raise MediaError(
            f"{path}: {content.name}; give an image ({IMAGES}), a video ({VIDEOS}), "
            "a folder of images or a NumPy file [T, H, W, 3]"
        )
    return "image" if content.kind == "image" else "video"


def is_image(path: str | os.PathLike[str]) -> bool:
    """Tell from its content whether a path is an image; a missing file is none.

    Example:
        >>> from mmfast.media import sample
        >>> is_image(sample("coffee.jpg")), is_image("missing.png")
        (True, False)
    """
    try:
        return kind_of(path) == "image"
    except MediaError:
        return False


def is_video(path: str | os.PathLike[str]) -> bool:
    """Tell from its content whether a path is a video; a missing file is none.

    Example:
        >>> from mmfast.media import sample
        >>> is_video(sample("bigbuckbunny.mp4")), is_video(sample("coffee.jpg"))
        (True, False)
    """
    try:
        return kind_of(path) == "video"
    except MediaError:
        return False
