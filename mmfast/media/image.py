"""One image, from a file, its bytes or Pillow, to upright RGB; limits are checked before decoding."""

from __future__ import annotations

import io
import os
from importlib import import_module
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from mmfast.media.errors import MediaError
from mmfast.media.sniff import HEAD_BYTES, IMAGES, check_file, content_of

MAX_IMAGE_PIXELS = 64_000_000
MAX_IMAGE_BYTES = 256 * 2**20
MAX_ASPECT = 100

# Opened by class and not by Image.open(), whose own pixel limit is a global of Pillow, and which would try
# every format that Pillow knows.
_CLASSES = {
    "PNG": ("PngImagePlugin", "PngImageFile"),
    "JPEG": ("JpegImagePlugin", "JpegImageFile"),
    "WEBP": ("WebPImagePlugin", "WebPImageFile"),
    "BMP": ("BmpImagePlugin", "BmpImageFile"),
    "GIF": ("GifImagePlugin", "GifImageFile"),
    "TIFF": ("TiffImagePlugin", "TiffImageFile"),
}


def check_shape(name: str, width: int, height: int, max_pixels: int) -> None:
    """Refuse sizes that would exhaust memory, and strips that no vision tower can make patches of.

    Raises:
        MediaError: if there are more than ``max_pixels`` pixels, none, or sides beyond 100:1.

    Example:
        >>> check_shape("strip.png", 1, 2000, 64_000_000)
        Traceback (most recent call last):
        mmfast.media.errors.MediaError: strip.png: 1x2000 pixels (width x height) is an extreme aspect ratio;
        the longer side may be at most 100 times the shorter one: crop or pad it
    """
    shape = f"{width}x{height} pixels (width x height)"
    if width < 1 or height < 1:
        raise MediaError(f"{name}: {shape} is empty; both sides must be at least 1")
    if width * height > max_pixels:
        raise MediaError(
            f"{name}: {shape} is more than max_pixels={max_pixels}; give a smaller one or raise max_pixels"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise MediaError(
            f"{name}: {shape} is an extreme aspect ratio; the longer side may be at most {MAX_ASPECT} times "
            "the shorter one: crop or pad it"
        )


def load_image(
    source: str | os.PathLike[str] | bytes | Image.Image,
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
    max_bytes: int = MAX_IMAGE_BYTES,
) -> Image.Image:
    """Load one image, upright and in RGB.

    Of animations and multi-page files the first picture is taken. Transparency is dropped, not blended, as
    transformers' ``load_image`` does, so that results can be compared. 16-bit grey is cut to its upper 8
    bits.

    Args:
        source: path of a PNG, JPEG, WEBP, BMP, GIF or TIFF file, the content of one, or a Pillow image.
        max_pixels: largest legal width x height, checked from the header.
        max_bytes: largest legal file.

    Returns:
        A new image of mode RGB, rotated as its EXIF orientation says. Nothing stays open.

    Raises:
        TypeError: if ``source`` is none of the above.
        MediaError: if the file is missing, of another format, damaged, too large, or beyond 100:1.

    Example:
        >>> from mmfast.media import sample
        >>> image = load_image(sample("coffee.jpg"))
        >>> image.size, image.mode
        ((600, 400), 'RGB')
    """
    if isinstance(source, Image.Image):
        name = "the Pillow image"
        check_shape(name, *source.size, max_pixels)
        return _upright_rgb(source, name)
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) > max_bytes:
            raise MediaError(
                f"image bytes: {len(source)} bytes are more than max_bytes={max_bytes}; "
                "give a smaller image or raise max_bytes"
            )
        head = bytes(source[:HEAD_BYTES])
        return _decode(io.BytesIO(source), "image bytes", content_of(head).name, max_pixels)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source is {type(source).__name__}; it must be a path, bytes or a Pillow image")
    path = Path(source)
    content = check_file(path, max_bytes=max_bytes)
    with path.open("rb") as file:
        return _decode(file, str(path), content.name, max_pixels)


def _decode(file: IO[bytes], name: str, format_name: str, max_pixels: int) -> Image.Image:
    if format_name not in _CLASSES:
        raise MediaError(f"{name}: {format_name}, not an image; give {IMAGES}, or read_video() for a video")
    module, class_name = _CLASSES[format_name]
    opener = getattr(import_module(f"PIL.{module}"), class_name)
    # Hostile files make Pillow raise nearly anything (SyntaxError, struct.error, MemoryError, ...): all of it
    # means that this image cannot be read.
    try:
        image: Image.Image = opener(file, name)
    except Exception as error:
        raise MediaError(f"{name}: {format_name} with a damaged header ({error}); save it again") from error
    check_shape(name, *image.size, max_pixels)
    with image:
        return _upright_rgb(image, name)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
    except Exception as error:
        raise MediaError(f"{name}: damaged or cut off ({error}); save or download it again") from error
    if image.mode in ("F", "I"):
        raise MediaError(f"{name}: 32-bit pixels (mode {image.mode}) have no fixed range; save it with 8 or 16 bits")
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:
        # An EXIF block that cannot be parsed says nothing about the pixels.
        upright = image
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.mode == "P" and "transparency" in upright.info:
        # Pillow asks for this step with a warning.
        upright = upright.convert("RGBA")
    return upright.convert("RGB")
