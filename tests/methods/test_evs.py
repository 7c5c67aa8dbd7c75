"""EVS: images, small budgets and frames of different sizes, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmfast.registry import get
from mmfast.tokens import Layout, VisualTokens

# Three frames of 2 x 2: in the second one token turns by 90 degrees, in the third another by 180.
STILL = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
TURNED = torch.stack([STILL[0], STILL[1], torch.tensor([-1.0, 1.0]), STILL[3]])
FLIPPED = torch.stack([TURNED[0], -TURNED[1], TURNED[2], TURNED[3]])
VIDEO = VisualTokens(torch.cat([STILL, TURNED, FLIPPED]), Layout.grid(2, 2, frames=3, modality="video"))


def kept(tokens: VisualTokens, **options: object) -> list[int]:
    return get("evs").method(**options)(tokens).indices.tolist()


def test_the_first_frame_and_then_what_changes_most() -> None:
    assert kept(VIDEO, keep=4) == [0, 1, 2, 3]
    assert kept(VIDEO, keep=5) == [0, 1, 2, 3, 9]
    assert kept(VIDEO, keep=6) == [0, 1, 2, 3, 6, 9]
    # The rest does not change at all, and comes in its order.
    assert kept(VIDEO, keep=0.75) == [0, 1, 2, 3, 4, 5, 6, 7, 9]


def test_a_budget_below_one_frame_is_shared() -> None:
    # A third of three tokens for the first frame, its middle one; the others go to what changes.
    assert kept(VIDEO, keep=3) == [2, 6, 9]
    assert kept(VIDEO, keep=1) == [9]


def test_an_image_is_thinned_evenly() -> None:
    image = VisualTokens(torch.randn(16, 4), Layout.grid(4, 4))
    assert kept(image, keep=0.25) == [2, 6, 10, 14]


def test_the_official_code_never_keeps_less_than_a_frame() -> None:
    assert kept(VIDEO, keep=0.1, compat="official") == [0, 1, 2, 3]
    assert kept(VIDEO, keep=2, compat="official") == [0, 1, 2, 3]
    # And it cuts off: 0.49 of 12 are 5, where we round to 6.
    assert kept(VIDEO, keep=0.49, compat="official") == [0, 1, 2, 3, 9]
    assert kept(VIDEO, keep=0.49) == [0, 1, 2, 3, 6, 9]


def test_a_place_that_was_not_there_before_is_new() -> None:
    layout = replace(
        Layout.grid(1, 5, modality="video"), frame=torch.tensor([0, 0, 1, 1, 1]), col=torch.tensor([0, 1, 0, 1, 2])
    )
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [1.0, 0.0]])
    assert kept(VisualTokens(features, layout), keep=3) == [0, 1, 4]


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="compat='paper' must be one of"):
        get("evs").method(compat="paper")
