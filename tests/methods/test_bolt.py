"""BOLT: frames at equal steps of the sum of scores."""

from __future__ import annotations

import pytest
import torch

from mmfast.registry import get
from mmfast.token_pruning.frame_base import VideoFrames
from mmfast.token_pruning.frames.bolt import sampled


def frames(*changes: float) -> VideoFrames:
    """Frames each of which differs from the one before by so much; the first counts as the second."""
    return VideoFrames(torch.tensor(changes).cumsum(dim=0)[:, None, None, None].expand(-1, 3, 2, 2))


def test_steps_of_the_sum() -> None:
    # Sums 0.1, 0.2, 0.6, 1.0; steps 1/4, 1/2, 3/4 and so on between 1/n and 1 - 1/n.
    scores = torch.tensor([0.1, 0.1, 0.4, 0.4]).double()
    assert sampled(scores, 4).tolist() == [2, 2, 2, 3]
    # Squares: sums 1/34, 2/34, 18/34, 1.
    assert sampled(scores, 2, 2.0).tolist() == [2, 2]


def test_repeated_frames_make_room_for_the_best_of_the_others() -> None:
    method = get("bolt").method(keep=3)
    # Stretched to 0..1 the changes are 0, 0, 1, 0.2, 0.1: every step falls on frame 2.
    assert method(frames(0.1, 0.1, 1.1, 0.3, 0.2)).tolist() == [2, 3, 4]


def test_one_frame_is_the_best() -> None:
    assert get("bolt").method(keep=1)(frames(0.1, 0.1, 0.9, 0.3)).tolist() == [2]


def test_equal_scores_are_evenly_spaced() -> None:
    assert get("bolt").method(keep=2)(frames(0.5, 0.5, 0.5, 0.5)).tolist() == [1, 3]


@pytest.mark.parametrize("power", [0, -1, True, "2", float("inf")])
def test_senseless_powers_are_refused(power: object) -> None:
    with pytest.raises(ValueError, match="power="):
        get("bolt").method(power=power)
