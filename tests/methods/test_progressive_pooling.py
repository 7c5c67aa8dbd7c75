"""Progressive pooling: one frame in several in full."""

from __future__ import annotations

import pytest
import torch

from mmfast.registry import get
from mmfast.tokens import Layout, VisualTokens


def video(frames: int, height: int, width: int) -> VisualTokens:
    count = frames * height * width
    return VisualTokens(torch.arange(count).float()[:, None], Layout.grid(height, width, frames=frames))


def test_the_papers_count_and_its_features() -> None:
    tokens = video(3, 2, 4)
    kept = get("progressive_pooling").method(group=2)(tokens)
    # Frames 0 and 2 stay; frame 1 (8 to 15) becomes the means of its two squares, at their top left corners.
    assert kept.indices.tolist() == [*range(8), 8, 10, *range(16, 24)]
    assert kept.features.flatten().tolist() == [*range(8), 10.5, 12.5, *range(16, 24)]
    assert kept.sizes.tolist() == [1.0] * 8 + [4.0] * 2 + [1.0] * 8
    assert get("progressive_pooling").method(group=1)(tokens) is None
    assert get("progressive_pooling").method(stride=1)(tokens) is None


def test_odd_grids_have_a_square_for_what_is_left_over() -> None:
    kept = get("progressive_pooling").method(group=2)(video(2, 3, 3))
    assert len(kept) == 9 + 4


@pytest.mark.parametrize("keep", range(1, 24))
def test_every_budget_is_met(keep: int) -> None:
    kept = get("progressive_pooling").method(keep=keep, group=2)(video(3, 2, 4))
    assert len(kept) == keep
    assert bool(kept.features.isfinite().all())


def test_a_large_budget_leaves_the_first_frames_whole() -> None:
    kept = get("progressive_pooling").method(keep=20, group=2)(video(3, 2, 4))
    whole = torch.cat([torch.arange(8), torch.arange(16, 24)])
    assert bool(torch.isin(whole, kept.indices).all())
    assert kept.features.flatten()[torch.isin(kept.indices, whole)].tolist() == whole.tolist()


@pytest.mark.parametrize("option", ["group", "stride"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_senseless_options_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option}="):
        get("progressive_pooling").method(**{option: value})
