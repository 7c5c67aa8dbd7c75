"""DyCoke: groups, budgets and single frames, by hand."""

from __future__ import annotations

import pytest
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.dycoke import group_length, official_references, reference
from mmfast.tokens import Layout, VisualTokens


def video(frames: int, places: int = 4) -> VisualTokens:
    """In frame t, place t modulo P points another way than all others."""
    features = torch.tensor([1.0, 0.0]).repeat(frames, places, 1)
    for frame in range(frames):
        features[frame, frame % places] = torch.tensor([0.0, 1.0])
    layout = Layout.grid(1, places, frames=frames, modality="video")
    return VisualTokens(features.flatten(0, 1), layout)


def kept(tokens: VisualTokens, **options: object) -> list[list[int]]:
    """Kept places of each frame."""
    layout = tokens.layout
    places = get("dycoke").method(**options)(tokens).indices
    return [layout.col[places[layout.frame[places] == frame]].tolist() for frame in layout.frame.unique()]


def test_frames_keep_what_their_reference_did_not_show() -> None:
    # Frame 0 stays; 1 and 2 are compared with it, 3 with 2: both odd places differ.
    assert kept(video(4), keep=10) == [[0, 1, 2, 3], [0, 1], [0, 2], [2, 3]]
    # The second group is treated like the first, and the odd last frame starts a third.
    assert kept(video(9), keep=24) == [
        [0, 1, 2, 3],
        [0, 1],
        [0, 2],
        [2, 3],
        [0, 1, 2, 3],
        [0, 1],
        [0, 2],
        [2, 3],
        [0, 1, 2, 3],
    ]


def test_groups_get_longer_where_the_budget_is_small() -> None:
    assert [group_length([4] * 16, budget) for budget in (28, 27, 22, 21, 19, 1)] == [4, 8, 8, 16, 16, 16]
    assert [reference(frame, 16) for frame in (4, 6, 8, 12, 15)] == [0, 4, 0, 8, 14]
    counts = [len(frame) for frame in kept(video(16), keep=22)]
    assert counts == [4, 1, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1, 1]


def test_each_frame_gets_its_share_where_none_can_stay_whole() -> None:
    assert kept(video(4), keep=3) == [[2], [0], [0], []]
    assert [len(frame) for frame in kept(video(4, 8), keep=6)] == [2, 2, 1, 1]


def test_an_image_is_thinned_evenly() -> None:
    image = VisualTokens(torch.randn(16, 4), Layout.grid(4, 4))
    assert get("dycoke").method(keep=0.25)(image).indices.tolist() == [2, 6, 10, 14]
    assert get("dycoke").method(keep=0.25, compat="official")(image).indices.tolist() == [2, 6, 10, 14]


def test_the_official_code_loses_an_odd_frame_and_spares_the_last_group() -> None:
    assert official_references(4) == [None, 0, None, 2]
    assert official_references(5) == [None, 0, 0, 2]
    assert kept(video(5), keep=7, compat="official") == [[0, 1, 2, 3], [0], [0], [2], []]


def test_the_official_code_cannot_keep_less_than_its_whole_frames() -> None:
    with pytest.raises(ValueError, match=r"keep=3 tokens is less than the 8 .* compat=None"):
        get("dycoke").method(keep=3, compat="official")(video(4))


def test_the_default_is_the_merge_ratio_of_the_paper() -> None:
    assert get("dycoke").method().keep == pytest.approx((1 + 3 * (1 - 0.7)) / 4)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="compat='paper' must be one of"):
        get("dycoke").method(compat="paper")
