"""Averages over time and space: counts, slots and values, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.registry import get
from mmfast.token_pruning.before_llm.temporal_mean import free_slots, middles, spatial_cells
from mmfast.tokens import Layout, VisualTokens

# Three frames of four places: value = 10 * frame + place.
VALUES = (10.0 * torch.arange(3)[:, None] + torch.arange(4)).flatten()
VIDEO = VisualTokens(VALUES[:, None], Layout.grid(2, 2, frames=3, modality="video"))


def test_one_token_per_place_and_one_per_frame() -> None:
    decision = get("temporal_mean").method()(VIDEO)
    assert len(decision) == 4 + 3
    # Places stand in the middle frame, frames in their middle, or next to it where that is taken.
    assert decision.indices.tolist() == [1, 3, 4, 5, 6, 7, 9]
    assert decision.features.flatten().tolist() == [1.5, 11.5, 10.0, 11.0, 12.0, 13.0, 21.5]
    assert decision.sizes.tolist() == [4.0, 4.0, 3.0, 3.0, 3.0, 3.0, 4.0]
    assert decision.source.tolist() == [2, 0, 4, 1, 2, 3, 4, 5, 2, 6, 4, 5]


def test_a_larger_budget_cuts_places_in_time() -> None:
    decision = get("temporal_mean").method(keep=9)(VIDEO)
    spatial = set(decision.features.flatten().tolist()) - {1.5, 11.5, 21.5}
    # The second and the fourth place are cut before the last frame.
    assert spatial == {10.0, 6.0, 21.0, 12.0, 8.0, 23.0}


def test_a_smaller_budget_joins_neighbours() -> None:
    decision = get("temporal_mean").method(keep=3)(VIDEO)
    # Of seven tokens three: two over time, one over space.
    assert sorted(decision.features.flatten().tolist()) == [10.5, 11.5, 12.5]


def test_an_image_has_fewer_tokens_than_places_and_frames() -> None:
    image = VisualTokens(VALUES[:, None], Layout.grid(3, 4))
    assert get("temporal_mean").method()(image) is None
    decision = get("temporal_mean").method(keep=6)(image)
    assert decision.features.flatten().tolist() == [0.5, 2.5, 10.5, 12.5, 20.5, 22.5]
    assert decision.indices.tolist() == [0, 2, 4, 6, 8, 10]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), share=st.floats(0.01, 1.0))
def test_frames_of_any_sizes(sizes: list[int], share: float) -> None:
    total = sum(sizes)
    cells = max(1, round(share * total))
    found = spatial_cells(sizes, cells)
    assert found.unique().tolist() == list(range(cells))
    frame = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    layout = replace(Layout.grid(1, total, modality="video"), frame=frame)
    values = torch.randn(total, 3, generator=torch.Generator().manual_seed(total))
    decision = get("temporal_mean").method(keep=cells)(VisualTokens(values, layout))
    assert decision is None or len(decision) == cells


def test_slots_are_in_the_middle_and_free() -> None:
    frames = torch.arange(4).repeat_interleave(2)
    assert middles(torch.tensor([0, 1] * 4), frames).tolist() == [2, 3]
    assert middles(torch.zeros(8, dtype=torch.int64), frames).tolist() == [2]
    assert free_slots(torch.tensor([2, 3, 2, 3]), 2, 5).tolist() == [2, 3, 1, 4]


def test_patches_are_averaged_before_the_projector() -> None:
    signals = {"patch_features": VALUES[:, None].repeat(1, 5)}
    projectable = replace(VIDEO, signals=signals, projectable=True)
    decision = get("temporal_mean").method()(projectable)
    assert decision.space == "vision"
    assert decision.features.shape == (7, 5)
    assert get("temporal_mean").method()(VIDEO).space == "llm"


def test_the_count_cannot_be_known_without_the_video() -> None:
    with pytest.raises(ValueError, match="decides from the data"):
        get("temporal_mean").method().keep_count(12)
