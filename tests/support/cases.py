"""The prompts every family is tested with, and where a method may be refused."""

from __future__ import annotations

import mmfast
from support.families import FAMILIES, Batch, Family


def one(family: Family) -> Batch:
    """One image."""
    return family.batch([3, family.image(), 4])


def two(family: Family) -> Batch:
    """Two images in one prompt, of different sizes where the family has several."""
    return family.batch([2, family.image(0, 1), 2, family.image(family.sizes - 1, 2), 4])


def mixed(family: Family) -> Batch:
    """Rows with two images, one image and none."""
    return family.batch(
        [2, family.image(0, 1), 2, family.image(family.sizes - 1, 2), 3], [5, family.image(0, 3), 4], [7]
    )


def video(family: Family) -> Batch:
    """Rows with a video and an image, with text alone, and with an image."""
    return family.batch([3, family.video(1), 2, family.image(0, 1), 4], [6], [2, family.image(0, 2), 2])


def text_only(family: Family) -> Batch:
    """Rows of text."""
    return family.batch([9], [5])


IMAGE_CASES = [(family, case) for family in FAMILIES.values() for case in (one, two, mixed)]
VIDEO_CASES = [(family, video) for family in FAMILIES.values() if family.has_video]
CASES = IMAGE_CASES + VIDEO_CASES
"""Every family with every prompt it can read."""


def case_id(value: object) -> str | None:
    """Name a family, a method or a prompt in the id of a test."""
    if isinstance(value, Family | mmfast.MethodInfo):
        return value.name
    return value.__name__ if callable(value) else None


# ------------------------------------------------------------------------ where a method may be refused

REFUSALS: dict[str, tuple[tuple[str, ...], str]] = {
    "downsample": (
        ("llava_next", "llava_next_video", "llava_onevision", "mistral3"),
        "cannot resize pictures for models of type",
    ),
}
"""Method -> the families on which it is refused, and what the message says."""

UNKNOWN_GRIDS: dict[str, str] = {
    "pool2d": "needs to know the grid",
    "m3_pool": "needs to know the grid",
    "oryx_compressor": "needs to know the grid",
    "pool_adapter": "needs to know the grid",
    "tokenpacker": "needs to know the grid",
}
"""Method -> what it says of media whose grid is not known, when it meets them."""


def refusal(family: Family, method: str) -> str | None:
    """Return what the message says if a method is refused on a family."""
    families, reason = REFUSALS.get(method, ((), ""))
    return reason if family.name in families else None


def lacks_grid(batch: Batch) -> bool:
    """Say whether the place of some visual tokens is not known."""
    layouts = [layout for row in batch.media for media in row for layout in media.layouts]
    return not all(layout.grid_known for layout in layouts)
