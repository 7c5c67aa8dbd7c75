"""AKS: stretches are halved until their best frames stand out."""

from __future__ import annotations

import pytest
import torch

from mmfast.registry import get
from mmfast.token_pruning.frame_base import VideoFrames, best_frames, completed, fit_to_text, unit_range
from mmfast.token_pruning.frames.aks import best_of, stretches


def frames(*scores: float) -> VideoFrames:
    """Frames and a question whose cosines are the scores."""
    values = torch.tensor(scores)
    embeds = torch.stack([values, (1 - values.square()).sqrt()], dim=1)
    signals = {"clip_frame_embeds": embeds, "clip_text_embeds": torch.tensor([[1.0, 0.0]])}
    return VideoFrames(torch.zeros(len(scores), 3, 2, 2), signals)


def test_a_peak_is_not_halved_and_takes_every_frame_of_its_stretch() -> None:
    # The best two exceed the mean of all by 0.45, in the second half by 0.5, and in the first by nothing.
    scores = torch.tensor([0.6, 0.6, 0.6, 0.6, 0.0, 0.0, 1.0, 1.0]).double()
    parts = stretches(scores, 2, 0.47, -100.0, 2)
    assert parts == [(4, 8, 1), (0, 2, 2), (2, 4, 2)]
    assert best_of(scores, parts, 4).tolist() == [0, 2, 6, 7]


def test_deviation_asks_for_spread() -> None:
    scores = torch.tensor([0.0, 0.0, 0.0, 1.0]).double()
    assert stretches(scores, 1, 0.5, 0.43, 1) == [(0, 4, 0)]
    assert stretches(scores, 1, 0.5, 0.44, 1) == [(0, 2, 1), (2, 4, 1)]


def test_odd_stretches_leave_the_longer_half_behind() -> None:
    assert stretches(torch.zeros(5).double(), 2, 0.8, -100.0, 1) == [(0, 2, 1), (2, 5, 1)]


def test_each_half_gives_its_share() -> None:
    method = get("aks").method(keep=2, relevance="clip")
    # The two best frames lie in one half, but the halves are equally worth a look.
    assert method(frames(0.1, 0.3, 0.2, 0.4, 0.9, 0.8)).tolist() == [1, 4]


def test_fewer_frames_than_stretches_are_still_as_many_as_promised() -> None:
    method = get("aks").method(keep=3, relevance="clip", depth=5)
    assert len(method(frames(*[0.1 * (place % 7) for place in range(40)]))) == 3


def test_equal_scores_are_evenly_spaced() -> None:
    method = get("aks").method(keep=2, relevance="clip")
    assert method(frames(0.5, 0.5, 0.5, 0.5)).tolist() == [1, 3]


@pytest.mark.parametrize(("option", "value"), [("threshold", "0.8"), ("deviation", float("nan")), ("depth", -1)])
def test_senseless_options_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option}="):
        get("aks").method(**{option: value})


def test_scores() -> None:
    assert fit_to_text(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist() == pytest.approx(
        [0.8536, 0.3536], abs=1e-4
    )
    assert unit_range(torch.tensor([float("nan"), 2.0, 4.0])).tolist() == [0.0, 0.0, 1.0]
    assert unit_range(torch.full((3,), float("nan"))) is None
    assert unit_range(torch.tensor([1.0, 1.0 + 1e-7])) is None
    assert best_frames(torch.tensor([1.0, 1.0, 2.0]), 2).tolist() == [0, 2]
    assert completed(torch.tensor([], dtype=torch.int64), torch.tensor([0.1, 0.2]), 1).tolist() == [1]


def test_without_a_clip_model_change_decides() -> None:
    pixels = torch.zeros(6, 3, 2, 2)
    pixels[3:] = 1.0
    method = get("aks").method(keep=1)
    assert method(VideoFrames(pixels)).tolist() == [3]
    with pytest.raises(ValueError, match="relevance='llm' must be one of 'change', 'clip'"):
        get("aks").method(relevance="llm")
