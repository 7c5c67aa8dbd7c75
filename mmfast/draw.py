"""Draw which patches survive, over the image or the frames they come from."""

from __future__ import annotations

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from mmfast.report import MediaRecord
from mmfast.tokens import Layout

_NIGHT = (16, 18, 24)
_EDGE = (255, 196, 0)
_STRIPE = 6


def tiles(layout: Layout) -> list[int]:
    """List the tiles that can be drawn: one for a plain grid; whole image and crops for AnyRes models.

    Example:
        >>> tiles(Layout.grid(2, 3)), tiles(Layout.unknown(6))
        ([0], [])
    """
    if layout.boxes is None:
        return []
    return sorted({int(tile) for tile in layout.tile[layout.col >= 0].tolist()})


def overlay(
    image: Image.Image, record: MediaRecord, frame: int = 0, *, tile: int | None = None, width: int = 448
) -> Image.Image:
    """Dim the patches that were dropped.

    Patches that never entered the language model are grey and nearly black; those that entered but were
    dropped inside it are half dark and striped; those its last layer still reads are clear, with a bright
    line where they border on others.

    Args:
        image: the image or one frame of the video, as the model saw it.
        record: what happened to its tokens; its layout must know where they lie.
        frame: number of the frame inside the video.
        tile: which of :func:`tiles` to draw; None takes the last, the finest.
        width: width of the drawing in pixels.

    Returns:
        A new RGB image.

    Raises:
        ValueError: if the layout does not know where the tokens lie.

    Example:
        >>> kept = torch.tensor([0, 3])
        >>> record = MediaRecord(0, "image", 4, 2, 2, kept, kept, Layout.grid(2, 2))
        >>> overlay(Image.new("RGB", (8, 8), "white"), record, width=64).size
        (64, 64)
    """
    layout = record.layout
    if layout.boxes is None:
        raise ValueError("the adapter of this model does not know where its tokens lie, so nothing can be drawn")
    if tile is None:
        tile = max(tiles(layout), default=0)
    clear = image.convert("RGB").resize(
        (width, max(1, round(width * image.height / image.width))), Image.Resampling.BICUBIC
    )
    here = (layout.frame == frame) & (layout.tile == tile) & (layout.col >= 0)
    entered, left = _chosen(record.entered_indices, here), _chosen(record.left_indices, here)
    every, inside, last = (_mask(layout.boxes[chosen], clear.size) for chosen in (here, entered, left))
    dark = Image.blend(ImageOps.grayscale(clear).convert("RGB"), Image.new("RGB", clear.size, _NIGHT), 0.78)
    half = Image.blend(clear, Image.new("RGB", clear.size, _NIGHT), 0.45)
    half.paste(dark, mask=_stripes(clear.size))
    drawn = clear.copy()
    drawn.paste(dark, mask=every)
    drawn.paste(half, mask=inside)
    drawn.paste(clear, mask=last)
    if bool((here & ~left).any()):
        # What a one-pixel erosion takes away is the border of the region, not of each patch.
        drawn.paste(_EDGE, mask=ImageChops.subtract(last, last.filter(ImageFilter.MinFilter(3))))
    return drawn


def _chosen(indices: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    flags = torch.zeros_like(among)
    flags[indices] = True
    return flags & among


def _mask(boxes: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """White where one of the boxes ``[n, 4]`` lies."""
    width, height = size
    mask = Image.new("L", size, 0)
    pen = ImageDraw.Draw(mask)
    for left, top, right, bottom in boxes.tolist():
        x, y = round(left * width), round(top * height)
        pen.rectangle((x, y, max(x, round(right * width) - 1), max(y, round(bottom * height) - 1)), fill=255)
    return mask


def _stripes(size: tuple[int, int]) -> Image.Image:
    """White diagonals: the difference must not rest on brightness alone."""
    width, height = size
    mask = Image.new("L", size, 0)
    pen = ImageDraw.Draw(mask)
    for start in range(-height, width, _STRIPE):
        pen.line((start, height, start + height, 0), fill=255)
    return mask
