"""What methods for videos share."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mmfast.token_pruning.video import counterparts, fit_counts, place_similarity
from mmfast.tokens import Layout


def uneven() -> Layout:
    """A frame of 2 x 2 and one of 1 x 3 tokens."""
    layout = Layout.grid(1, 7, modality="video")
    return replace(
        layout,
        frame=torch.tensor([0, 0, 0, 0, 1, 1, 1]),
        row=torch.tensor([0, 0, 1, 1, 0, 0, 0]),
        col=torch.tensor([0, 1, 0, 1, 0, 1, 2]),
    )


def test_frames_of_different_sizes_are_compared_where_both_have_a_token() -> None:
    layout, first, second = uneven(), torch.arange(4), torch.arange(4, 7)
    assert counterparts(layout, second, first).tolist() == [0, 1, -1]
    assert counterparts(layout, first, second).tolist() == [4, 5, -1, -1]
    similarity = place_similarity(torch.ones(7, 3), layout, second, first)
    assert similarity[:2].allclose(torch.ones(2))
    assert similarity[2] == -1.0


def test_frames_without_a_grid_are_compared_in_their_order() -> None:
    layout = replace(Layout.grid(1, 2, frames=2), row=torch.full((4,), -1), col=torch.full((4,), -1), grid_known=False)
    assert counterparts(layout, torch.tensor([2, 3]), torch.tensor([0, 1])).tolist() == [0, 1]


def test_zeros_are_like_nothing() -> None:
    layout = Layout.grid(1, 1, frames=2)
    assert place_similarity(torch.zeros(2, 4), layout, torch.tensor([1]), torch.tensor([0])).tolist() == [0.0]


@settings(deadline=None)
@given(
    frames=st.lists(st.tuples(st.integers(1, 20), st.floats(0, 50)), min_size=1, max_size=9),
    share=st.floats(0, 1),
    least=st.integers(0, 4),
)
@example(frames=[(3, 0.0), (4, 0.0)], share=0.5, least=0)
@example(frames=[(3, 0.0), (4, 9.0)], share=0.9, least=1)
def test_counts_add_up_and_fit(frames: list[tuple[int, float]], share: float, least: int) -> None:
    sizes, wanted = [size for size, _ in frames], [want for _, want in frames]
    total = round(share * sum(sizes))
    assume(total)
    counts = fit_counts(wanted, sizes, total, least)
    assert sum(counts) == total
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    if total >= least * len(sizes):
        assert all(count >= min(least, size) for count, size in zip(counts, sizes, strict=True))


def test_what_overflows_goes_to_the_others_in_proportion() -> None:
    assert fit_counts([100.0, 2.0, 1.0], [10, 10, 10], 19) == [10, 6, 3]
    # Nobody wants any: all get the same.
    assert fit_counts([0.0, 0.0], [4, 4], 4) == [2, 2]
