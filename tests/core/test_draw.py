"""Drawings of kept patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmfast.draw import overlay
from mmfast.report import MediaRecord
from mmfast.tokens import Layout


def record(entered: list[int], left: list[int], layout: Layout) -> MediaRecord:
    return MediaRecord(
        0, layout.modality, len(layout), len(entered), len(left), torch.tensor(entered), torch.tensor(left), layout
    )


def brightness(picture: Image.Image, row: int, col: int) -> float:
    """Mean of the inside of one cell of a 2 x 2 grid drawn 100 pixels wide."""
    pixels = np.asarray(picture.convert("L"))
    return float(pixels[row * 50 + 10 : row * 50 + 40, col * 50 + 10 : col * 50 + 40].mean())


def test_dropped_patches_are_darker_the_earlier_they_went() -> None:
    drawn = overlay(Image.new("RGB", (40, 40), "white"), record([0, 1], [0], Layout.grid(2, 2)), width=100)
    kept, inside, before = brightness(drawn, 0, 0), brightness(drawn, 0, 1), brightness(drawn, 1, 0)
    assert kept == 255.0
    assert before < inside < kept


def test_only_the_asked_frame_is_drawn() -> None:
    layout = Layout.grid(2, 2, frames=2, modality="video")
    kept = record([0, 1, 2, 3], [0, 1, 2, 3], layout)
    white = Image.new("RGB", (40, 40), "white")
    assert brightness(overlay(white, kept, 0, width=100), 1, 1) == 255.0
    assert brightness(overlay(white, kept, 1, width=100), 1, 1) < 100


def test_unknown_places_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="does not know where"):
        overlay(Image.new("RGB", (4, 4)), record([0], [0], Layout.unknown(2)))
