"""V-CAST: budgets of frames and single frames, by hand."""

from __future__ import annotations

import pytest
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.v_cast import curvature, official_counts
from mmfast.token_pruning.video import fit_counts
from mmfast.tokens import Layout, VisualTokens

# The course turns back at the fourth of six frames.
COURSE = torch.tensor([0.0, 1.0, 2.0, 3.0, 2.0, 1.0])
VIDEO = VisualTokens(
    torch.stack([COURSE + 3.0, torch.full((6,), 4.0)], dim=-1).repeat_interleave(5, dim=0)
    + torch.randn(30, 2, generator=torch.Generator().manual_seed(0)) * 1e-3,
    Layout.grid(1, 5, frames=6, modality="video"),
)


def counts(tokens: VisualTokens, **options: object) -> list[int]:
    kept = get("v_cast").method(**options)(tokens).indices
    return torch.bincount(tokens.layout.frame[kept], minlength=int(tokens.layout.frame.max()) + 1).tolist()


def test_frames_where_the_course_turns_keep_more() -> None:
    found = counts(VIDEO, keep=12)
    assert found[3] == max(found)
    assert sum(found) == 12
    # Straight on is nothing new.
    assert found[1] == found[2] == found[4] < found[0] == found[5]
    assert counts(VIDEO, keep=12, temperature=1e6) == [2] * 6


def test_what_rounding_leaves_over() -> None:
    # Beside one each, the frames want 0.4, 1.84, 1.04 and 0.72 of four tokens; cut off, two are left over.
    assert official_counts([0.1, 0.46, 0.26, 0.18], [9] * 4, 8, 1) == [1, 4, 2, 1]
    assert fit_counts([1.4, 2.84, 2.04, 1.72], [9] * 4, 8) == [1, 3, 2, 2]
    assert official_counts([0.25, 0.25, 0.25, 0.25], [9] * 4, 7, 1) == [4, 1, 1, 1]
    assert official_counts([0.9, 0.1], [3, 9], 10, 1) == [3, 7]
    assert official_counts([0.5, 0.5], [3, 9], 1, 1) == [1, 1]


def test_counts_are_exact_and_the_minimum_holds_as_far_as_it_can() -> None:
    for keep in range(1, 30):
        found = counts(VIDEO, keep=keep, minimum=2)
        assert sum(found) == keep
        assert min(found) >= min(2, keep // 6)
    assert sum(counts(VIDEO, keep=2, compat="official")) == 6
    assert max(counts(VIDEO, keep=3, minimum=0, temperature=0.01)) == 3


def test_inside_a_frame_the_large_and_the_unlike_stay() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [4.0, 0.0], [0.0, 1.0]])
    image = VisualTokens(features, Layout.grid(2, 2))
    assert get("v_cast").method(keep=2)(image).indices.tolist() == [2, 3]
    # The official code does not prune single frames.
    assert get("v_cast").method(keep=2, compat="official")(image).indices.tolist() == [0, 1, 2, 3]


def test_the_course_of_few_or_equal_frames() -> None:
    assert curvature(torch.zeros(1, 3)).tolist() == [1.0]
    assert curvature(torch.randn(2, 3)).tolist() == [1.0, 1.0]
    assert curvature(torch.ones(4, 3)).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.0), ("temperature", float("nan")), ("minimum", -1), ("minimum", 1.5), ("compat", "paper")],
)
def test_bad_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        get("v_cast").method(**{field: value})
