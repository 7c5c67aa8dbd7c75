"""The prompts every family is tested with."""

from __future__ import annotations

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
    """Name a family or a prompt in the id of a test."""
    if isinstance(value, Family):
        return value.name
    return value.__name__ if callable(value) else None
