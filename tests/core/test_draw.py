"""Drawings of kept patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmfast.draw import overlay, tiles
from mmfast.report import MediaRecord
from mmfast.tokens import Layout

WHITE = Image.new("RGB", (40, 40), "white")


def record(entered: list[int], left: list[int], layout: Layout) -> MediaRecord:
    return MediaRecord(
        0, layout.modality, len(layout), len(entered), len(left), torch.tensor(entered), torch.tensor(left), layout
    )


def inside(picture: Image.Image, row: int, col: int) -> np.ndarray:
    """The inside of one cell of a 2 x 2 grid drawn 100 pixels wide, float ``[30, 30, 3]``."""
    return np.asarray(picture, float)[row * 50 + 10 : row * 50 + 40, col * 50 + 10 : col * 50 + 40]


def brightness(picture: Image.Image, row: int, col: int) -> float:
    return float(inside(picture, row, col).mean())


def test_dropped_patches_are_darker_the_earlier_they_went() -> None:
    drawn = overlay(WHITE, record([0, 1], [0], Layout.grid(2, 2)), width=100)
    kept, half, before = brightness(drawn, 0, 0), brightness(drawn, 0, 1), brightness(drawn, 1, 0)
    assert kept == 255.0
    assert before < half < kept


def test_only_patches_dropped_inside_are_striped() -> None:
    drawn = overlay(WHITE, record([0, 1], [0], Layout.grid(2, 2)), width=100)
    assert len(np.unique(inside(drawn, 0, 1))) > len(np.unique(inside(drawn, 1, 0)))
    assert np.ptp(inside(drawn, 0, 0)) == 0


def test_patches_that_never_entered_lose_their_colour() -> None:
    red = Image.new("RGB", (40, 40), "red")
    drawn = overlay(red, record([0], [0], Layout.grid(2, 2)), width=100)
    assert np.ptp(inside(drawn, 1, 1).mean((0, 1))) < 20 < np.ptp(inside(drawn, 0, 0).mean((0, 1)))


def test_a_line_runs_around_the_region_and_not_through_it() -> None:
    drawn = np.asarray(overlay(WHITE, record([0, 1], [0, 1], Layout.grid(2, 2)), width=100))
    assert tuple(drawn[49, 25]) == (255, 196, 0)
    assert tuple(drawn[25, 49]) == tuple(drawn[25, 50]) == (255, 255, 255)


def test_a_picture_of_which_all_is_kept_is_left_alone() -> None:
    drawn = overlay(WHITE, record([0, 1, 2, 3], [0, 1, 2, 3], Layout.grid(2, 2)), width=100)
    assert np.asarray(drawn).min() == 255


def test_only_the_asked_frame_is_drawn() -> None:
    kept = record([0, 1, 2, 3], [0, 1, 2, 3], Layout.grid(2, 2, frames=2, modality="video"))
    assert brightness(overlay(WHITE, kept, 0, width=100), 1, 1) == 255.0
    assert brightness(overlay(WHITE, kept, 1, width=100), 1, 1) < 100


def anyres() -> Layout:
    """One token for the whole image, then a row of two crops with a newline token at its end."""
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 0, 0]])
    tile, col = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, -1])
    zeros = torch.zeros(4, dtype=torch.int64)
    return Layout("image", zeros, tile, zeros, col, col < 0, boxes)


def test_whole_image_and_crops_are_drawn_apart() -> None:
    layout = anyres()
    assert tiles(layout) == [0, 1]
    kept = record([0, 2], [0, 2], layout)
    assert np.asarray(overlay(WHITE, kept, tile=0, width=100)).min() == 255
    crops = overlay(WHITE, kept, tile=1, width=100)
    assert brightness(crops, 0, 0) < 100 < brightness(crops, 0, 1) == 255.0
    assert np.array_equal(np.asarray(overlay(WHITE, kept, width=100)), np.asarray(crops))


def test_unknown_places_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="does not know where"):
        overlay(WHITE, record([0], [0], Layout.unknown(2)))
