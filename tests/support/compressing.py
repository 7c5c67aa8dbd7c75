"""Tiny models that know a compression token, and prompts that hold it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from mmfast.adapters import CompressionTokens
from support.families import Batch, Family
from support.prompts import VOCO, Piece

COUNT = 3


def marks(count: int = COUNT) -> Piece:
    """Compression tokens as they stand behind an image."""
    return (VOCO,) * count


@contextmanager
def compressing(family: Family) -> Iterator[None]:
    """Let the models of a family know the token for as long as the context lasts."""
    # A model that was asked for without naming its attention is another object.
    models = [family.model(), family.model("sdpa"), family.model("eager")]
    known = asdict(CompressionTokens("<voco>", VOCO, COUNT, "all"))
    for model in models:
        model.config.voco = known
    try:
        yield
    finally:
        for model in models:
            del model.config.voco


def one(family: Family) -> Batch:
    """One image."""
    return family.batch([3, family.image(), 1, marks(), 4])


def two(family: Family) -> Batch:
    """Two images with text between them."""
    return family.batch([2, family.image(0, 1), marks(), 2, family.image(family.sizes - 1, 2), marks(2), 4])


def mixed(family: Family) -> Batch:
    """Rows with two images, one, one that is not compressed, and none."""
    return family.batch(
        [2, family.image(0, 1), marks(), 2, family.image(family.sizes - 1, 2), 1, marks(2), 3],
        [5, family.image(0, 3), marks(), 4],
        [2, family.image(0, 4), 3],
        [7],
    )


def video(family: Family) -> Batch:
    """A video and an image."""
    return family.batch([3, family.video(1), marks(), 2, family.image(0, 1), marks(), 4], [2, family.image(), 2])
