"""Draw which patches survive, over the image or the frames they come from."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

from mmfast.report import MediaRecord

_DIM = (16, 18, 24, 190)
_HALF = (16, 18, 24, 105)
_EDGE = (255, 196, 0, 255)


def overlay(image: Image.Image, record: MediaRecord, frame: int = 0, width: int = 448) -> Image.Image:
    """Dim the patches that were dropped.

    Patches that never entered the language model are nearly black, those that entered but were dropped
    inside it half dark, and those its last layer still reads are clear with a thin edge.

    Args:
        image: the image, or one frame of the video.
        record: what happened to its tokens; its layout must know where they lie.
        frame: number of the frame inside the video.
        width: width of the drawing in pixels.

    Returns:
        A new RGB image.

    Raises:
        ValueError: if the layout does not know where the tokens lie.

    Example:
        >>> from mmfast.tokens import Layout
        >>> kept = torch.tensor([0, 3])
        >>> record = MediaRecord(0, "image", 4, 2, 2, kept, kept, Layout.grid(2, 2))
        >>> overlay(Image.new("RGB", (8, 8), "white"), record, width=64).size
        (64, 64)
    """
    layout = record.layout
    if layout.boxes is None:
        raise ValueError("the adapter of this model does not know where its tokens lie, so nothing can be drawn")
    height = max(1, round(width * image.height / image.width))
    canvas = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC).convert("RGBA")
    entered, left = _flags(record.entered_indices, len(layout)), _flags(record.left_indices, len(layout))
    # Where an image is shown whole and in tiles, the finest tiles are drawn last and stay visible.
    places = ((layout.frame == frame) & (layout.col >= 0)).nonzero().squeeze(-1)
    finest = layout.tile[places].max() if places.numel() else 0
    places = places[layout.tile[places] == finest]
    shade = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(shade)
    for place in places.tolist():
        left_edge, top, right, bottom = (float(value) for value in layout.boxes[place])
        box = (
            round(left_edge * width),
            round(top * height),
            max(round(right * width) - 1, round(left_edge * width)),
            max(round(bottom * height) - 1, round(top * height)),
        )
        if not entered[place]:
            pen.rectangle(box, fill=_DIM)
        elif not left[place]:
            pen.rectangle(box, fill=_HALF)
        elif record.left < record.tokens:
            pen.rectangle(box, outline=_EDGE)
    return Image.alpha_composite(canvas, shade).convert("RGB")


def _flags(indices: torch.Tensor, total: int) -> list[bool]:
    flags = torch.zeros(total, dtype=torch.bool)
    flags[indices] = True
    return [bool(flag) for flag in flags.tolist()]
