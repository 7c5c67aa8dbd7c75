"""HoliTom before the language model: what stands still, and budgets that averaging alone cannot meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.before_llm.holitom import best_windows
from mmfast.tokens import Keep, Layout, VisualTokens


def decide(features: Tensor, layout: Layout, attention: Tensor, **options: object) -> Keep:
    tokens = VisualTokens(features, layout, signals={"received_attention": attention})
    found = get("holitom").method(**options)(tokens)
    assert found is not None
    return found


def test_a_still_place_is_averaged_and_the_rest_chosen_by_attention() -> None:
    # Two frames of three tokens: the first place stays, the others turn round.
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, -1.0], [0.0, -1.0]])
    attention = torch.tensor([0.0, 0.2, 0.1, 0.0, 0.1, 0.2])
    keep = decide(features, Layout.grid(1, 3, frames=2), attention, keep=3)
    assert keep.indices.tolist() == [0, 1, 5]
    assert keep.features.tolist() == [[2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]
    assert keep.sizes.tolist() == [2.0, 1.0, 1.0]
    assert keep.source.tolist() == [0, 1, -1, 0, -1, 2]


@pytest.mark.parametrize("kept", [1, 3, 4, 5, 11])
def test_a_still_video_keeps_as_many_as_wanted(kept: int) -> None:
    frame = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    keep = decide(frame.repeat(3, 1), Layout.grid(2, 2, frames=3), torch.arange(12.0), keep=kept)
    assert len(keep) == kept
    # Up to four, everything is averaged over time; more than that tokens of single frames have to make up.
    assert (keep.source.view(3, 4) == keep.source[:4]).all() == (kept <= 4)


def test_an_image_is_a_choice_by_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    features, attention = torch.randn(6, 4, generator=generator), torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0, 0.0])
    keep = decide(features, Layout.grid(2, 3), attention, keep=3)
    assert keep.indices.tolist() == [0, 2, 4]
    assert torch.equal(keep.features, features[[0, 2, 4]])


def test_frames_of_different_sizes_are_not_averaged() -> None:
    layout = Layout.grid(1, 6)
    frame = torch.tensor([0, 0, 1, 1, 1, 1])
    layout = Layout("video", frame, layout.tile, layout.row, layout.col, layout.is_newline)
    keep = decide(torch.ones(6, 2), layout, torch.arange(6.0), keep=5)
    assert len(keep) == 5
    assert keep.sizes.tolist() == [1.0] * 5


def test_windows_save_the_most() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        still = list(torch.rand(5, 6, generator=generator) < 0.6)
        windows, saved = best_windows(still, [torch.arange(6)] * 6)
        assert saved == sum(gain(still, *window) for window in windows)
        assert [frame for start, end in windows for frame in range(start, end + 1)] == list(range(6))
        cuts = [[place for place in range(5) if choice >> place & 1] for choice in range(32)]
        assert saved == max(sum(gain(still, *window) for window in split(own)) for own in cuts)


def split(cuts: list[int]) -> list[tuple[int, int]]:
    return list(zip([0, *(cut + 1 for cut in cuts)], [*cuts, 5], strict=True))


def gain(still: list[Tensor], start: int, end: int) -> int:
    return int(torch.stack(still[start:end]).all(dim=0).sum()) * (end - start) if end > start else 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"threshold=1.5 must be a cosine similarity, in \[-1, 1\]"),
        ({"weight": -0.1}, r"weight=-0.1 must lie in \[0, 1\]"),
        ({"neighbours": 0}, "neighbours=0 must be at least 1"),
        ({"compat": "paper"}, "compat='paper' must be one of"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("holitom").method(**options)
