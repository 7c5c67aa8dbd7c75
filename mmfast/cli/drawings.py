"""Which picture belongs to which record of a report, and how the model saw it."""

from __future__ import annotations

from typing import Any, NamedTuple

from PIL import Image

from mmfast.cli.common import Media
from mmfast.draw import overlay, tiles
from mmfast.report import MediaRecord, Report

LIMIT = 12
"""Pictures drawn per plan; the page should stay small enough to send."""


class Drawing(NamedTuple):
    """A picture with its dropped patches dimmed.

    Attributes:
        caption: what it shows.
        image: the drawing, RGB.
    """

    caption: str
    image: Image.Image


class View(NamedTuple):
    """One picture as one record of a report has it.

    Attributes:
        caption: what it shows.
        picture: the image or frame.
        record: what happened to its tokens.
        frame: number of the frame inside the record's video; 0 for an image.
        tile: which of the layout's tiles.
        seconds: when the frame is shown; None for an image.
    """

    caption: str
    picture: Image.Image
    record: MediaRecord
    frame: int
    tile: int = 0
    seconds: float | None = None


def views(report: Report, media: Media) -> tuple[list[View], str]:
    """Choose what to draw of every image and frame of a prompt.

    Args:
        report: what a plan did.
        media: what was asked about.

    Returns:
        At most :data:`LIMIT` views, and a note on what is not drawn, which may be empty.
    """
    shown = shown_frames(report, media)
    if shown is None:
        return [], "Not drawn: this family cuts pictures into tiles and does not say where each lies."
    if any(view.record.layout.boxes is None for view in shown):
        return [], "Not drawn: this family does not say where its tokens lie."
    found = []
    for view in shown:
        parts = tiles(view.record.layout)
        names = [f"{view.caption}, {'crops' if tile else 'as a whole'}" if len(parts) > 1 else "" for tile in parts]
        found += [
            view._replace(tile=tile, caption=name or view.caption) for tile, name in zip(parts, names, strict=True)
        ]
    step = max(1, -(-len(found) // LIMIT))
    return found[::step], f"One picture in {step} is drawn." if step > 1 else ""


def drawings(report: Report, media: Media, processor: Any) -> tuple[list[Drawing], str]:
    """Draw every image and frame of a prompt.

    Args:
        report: what a plan did.
        media: what was asked about.
        processor: the processor of the model, which may cut pictures.

    Returns:
        At most :data:`LIMIT` drawings, and a note on what is not drawn, which may be empty.
    """
    chosen, note = views(report, media)
    drawn = [
        Drawing(
            view.caption,
            overlay(as_seen(processor, view.picture, view.record.modality), view.record, view.frame, tile=view.tile),
        )
        for view in chosen
    ]
    return drawn, note


def shown_frames(report: Report, media: Media) -> list[View] | None:
    """Pair every picture with its record and frame number; None where they do not fit one to one."""
    stills = [record for record in report.media if record.modality == "image"]
    clips = [record for record in report.media if record.modality == "video"]
    images = [(f"image {number}", image, None) for number, image in enumerate(media.images, 1)]
    frames = [(f"{time:.1f} s", frame, time) for time, frame in zip(media.times, media.frames, strict=True)]
    pictures: list[tuple[str, Image.Image, float | None]] = [*images, *([] if clips else frames)]
    if len(pictures) != len(stills) or len(clips) > 1:
        return None
    paired = [
        View(caption, image, record, 0, seconds=time)
        for (caption, image, time), record in zip(pictures, stills, strict=True)
    ]
    for record in clips:
        # Some models join neighbouring frames: each drawn frame stands for those joined with it.
        steps = int(record.layout.frame.max()) + 1
        for step in range(min(steps, len(frames))):
            caption, image, time = frames[step * len(frames) // steps]
            paired.append(View(caption, image, record, step, seconds=time))
    return paired


def as_seen(processor: Any, picture: Image.Image, modality: str) -> Image.Image:
    """Cut a picture as the processor does, so that patches are drawn where the model saw them.

    Processors of CLIP's kind bring the shorter side to a size and cut the middle out.
    """
    own = getattr(processor, "video_processor", None) if modality == "video" else None
    rules = own or getattr(processor, "image_processor", None)
    cut, size = getattr(rules, "crop_size", None), getattr(rules, "size", None)
    if not getattr(rules, "do_center_crop", False) or not cut or not size:
        return picture
    width, height = picture.size
    shortest = size.get("shortest_edge")
    if getattr(rules, "do_resize", False):
        scale_x = shortest / min(width, height) if shortest else size["width"] / width
        scale_y = shortest / min(width, height) if shortest else size["height"] / height
    else:
        scale_x = scale_y = 1.0
    half_x, half_y = cut["width"] / scale_x / 2, cut["height"] / scale_y / 2
    box = (width / 2 - half_x, height / 2 - half_y, width / 2 + half_x, height / 2 + half_y)
    return picture.crop(tuple(round(edge) for edge in box))
