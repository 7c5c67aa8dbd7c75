"""Frames of every shot."""

from __future__ import annotations

import pytest
import torch

from mmfast.registry import get
from mmfast.token_pruning.frame_base import VideoFrames
from mmfast.token_pruning.frames.scene_cut import cut_places


def shots(*lengths: int, drift: float = 0.01) -> VideoFrames:
    """Shots that drift slowly, and jump by one from one to the next."""
    steps = [drift + (place == 0 and number > 0) for number, length in enumerate(lengths) for place in range(length)]
    return VideoFrames(torch.tensor(steps).cumsum(dim=0)[:, None, None, None].expand(-1, 3, 2, 2))


def test_every_shot_gives_a_frame_and_longer_ones_more() -> None:
    method = get("scene_cut").method(keep=4)
    assert method(shots(2, 8, 2)).tolist() == [1, 4, 8, 11]


def test_of_more_shots_than_frames_the_largest_jumps_count() -> None:
    pixels = torch.tensor([0.0, 0.0, 1.0, 1.0, 3.0, 3.0])[:, None, None, None].expand(-1, 3, 2, 2)
    assert get("scene_cut").method(keep=2)(VideoFrames(pixels)).tolist() == [2, 5]
    assert cut_places(torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0]), 1, 3.0) == [4]
    assert cut_places(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]), 1, 3.0) == [2]


def test_a_video_without_cuts_is_evenly_spaced() -> None:
    assert get("scene_cut").method(keep=3)(shots(9)).tolist() == [1, 4, 7]
    # Nothing moves: rounding is no cut.
    assert get("scene_cut").method(keep=3)(shots(9, drift=0.0)).tolist() == [1, 4, 7]
    assert cut_places(torch.tensor([]), 3, 3.0) == []


def test_the_jump_says_what_a_cut_is() -> None:
    steps = torch.tensor([0.1, 0.1, 0.5, 0.1, 0.25])
    assert cut_places(steps, 9, 3.0) == [3]
    assert cut_places(steps, 9, 2.0) == [3, 5]


@pytest.mark.parametrize("jump", [0.5, float("nan"), True, "3"])
def test_senseless_jumps_are_refused(jump: object) -> None:
    with pytest.raises(ValueError, match="jump="):
        get("scene_cut").method(jump=jump)
