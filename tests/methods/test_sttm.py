"""STTM: trees on maps of any shape, chains over time, and counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.before_llm.sttm import grids_over_time, halved_sum
from mmfast.token_pruning.similarity import chain_heads
from mmfast.tokens import Layout, VisualTokens


def even_map(frames: int = 1, side: int = 8) -> Tensor:
    """One direction on the left half of a map and another on the right, ``[frames * side * side, 2]``."""
    left = torch.tensor([1.0, 0.0]).expand(frames, side, side // 2, 2)
    right = torch.tensor([0.0, 1.0]).expand(frames, side, side // 2, 2)
    return torch.cat([left, right], dim=2).flatten(0, 2)


def test_an_even_image_becomes_its_largest_blocks() -> None:
    tokens = VisualTokens(even_map(), Layout.grid(8, 8))
    keep = get("sttm").method(root_level=0)(tokens)
    assert keep.indices.tolist() == [0, 4, 32, 36]
    assert keep.sizes.tolist() == [16.0] * 4
    assert keep.features.tolist() == [[1.0, 0.0], [0.0, 1.0]] * 2
    # One level further down blocks are half as large.
    assert len(get("sttm").method()(tokens)) == 16
    # Deeper than the tree there are only single tokens.
    assert get("sttm").method(root_level=9)(tokens) is None


def test_blocks_that_stay_are_joined_over_time() -> None:
    video = even_map(3)
    keep = get("sttm").method(root_level=0)(VisualTokens(video, Layout.grid(8, 8, frames=3)))
    assert keep.indices.tolist() == [0, 4, 32, 36]
    assert keep.sizes.tolist() == [48.0] * 4
    apart = get("sttm").method(root_level=0, temporal=None)(VisualTokens(video, Layout.grid(8, 8, frames=3)))
    assert len(apart) == 12


def test_a_block_is_joined_with_the_parts_it_contains() -> None:
    video = even_map(2)
    video[64] = torch.tensor([0.0, 1.0])
    # The corner of the second frame splits its block; all but the corner itself still resemble the first frame.
    keep = get("sttm").method()(VisualTokens(video, Layout.grid(8, 8, frames=2)))
    assert len(keep) == 17
    assert keep.indices[[0, 16]].tolist() == [0, 64]
    assert keep.sizes.tolist() == [7.0] + [8.0] * 15 + [1.0]


def test_odd_sides_have_narrow_blocks_at_the_top_and_left() -> None:
    tokens = VisualTokens(torch.ones(35, 2), Layout.grid(5, 7))
    keep = get("sttm").method(root_level=1)(tokens)
    # 5 x 7 becomes 3 x 4, whose first row and column are narrow, and that 2 x 2.
    assert keep.indices.tolist() == [0, 1, 3, 5, 7, 8, 10, 12, 21, 22, 24, 26]
    assert keep.sizes.tolist() == [1.0, 2.0, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0, 2.0, 4.0, 4.0, 4.0]


def test_weighing_counts_patches_instead_of_blocks() -> None:
    # 7 x 7 becomes 4 x 4 and 2 x 2: the first root holds blocks of 1, 2, 2 and 4 tokens.
    features = torch.ones(49, 2)
    features[0] = 5.0
    plain, weighed = (
        get("sttm").method(root_level=0, threshold=-1.0, weighted=weighted)(VisualTokens(features, Layout.grid(7, 7)))
        for weighted in (False, True)
    )
    assert plain.sizes.tolist() == weighed.sizes.tolist() == [9.0, 12.0, 12.0, 16.0]
    assert plain.features[0].tolist() == [2.0, 2.0]
    assert weighed.features[0].tolist() == pytest.approx([13 / 9] * 2)


@pytest.mark.parametrize("keep", [1, 2, 7, 40, 100, 191, 0.3])
@pytest.mark.parametrize("noise", [0.0, 0.3, 5.0])
def test_any_count_is_met(keep: float, noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features = even_map(3) + noise * torch.randn(192, 2, generator=generator)
    found = get("sttm").method(keep=keep)(VisualTokens(features, Layout.grid(8, 8, frames=3)))
    wanted = keep if isinstance(keep, int) else round(keep * 192)
    assert len(found) == wanted
    assert int(found.sizes.sum()) == 192
    assert found.source.unique().tolist() == list(range(wanted))


def test_a_joined_token_is_the_mean_of_what_went_into_it() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 8, generator=generator)
    found = get("sttm").method(keep=20, weighted=True)(VisualTokens(features, Layout.grid(8, 8)))
    for index in range(20):
        assert torch.allclose(found.features[index], features[found.source == index].mean(dim=0), atol=1e-5)


def test_maps_are_cut_where_their_size_changes_and_strangers_stand_alone() -> None:
    small, large, row = Layout.grid(2, 2), Layout.grid(3, 3), torch.tensor([-1])
    layout = Layout(
        "video",
        torch.tensor([0, 0, 0, 0, 1, 1, 1, 1] + [2] * 10),
        torch.zeros(18, dtype=torch.int64),
        torch.cat([small.row, small.row, large.row, row]),
        torch.cat([small.col, small.col, large.col, row]),
        torch.zeros(18, dtype=torch.bool),
    )
    assert [tuple(places.shape) for places in grids_over_time(layout)] == [(2, 2, 2), (1, 3, 3), (1, 1, 1)]
    assert len(get("sttm").method(keep=5)(VisualTokens(torch.ones(18, 2), layout))) == 5


def test_tokens_without_a_place_are_joined_with_the_next() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0], [-1.0, 0.0]])
    assert get("sttm").method()(VisualTokens.from_features(features)) is None
    keep = get("sttm").method(keep=3)(VisualTokens.from_features(features))
    assert keep.indices.tolist() == [0, 2, 4]
    assert keep.features.tolist() == [[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]


def test_chains_are_followed_to_the_end() -> None:
    # Two chains that meet at their ends only: the rounds of the official code stop before they become one.
    before, after = torch.tensor([0, 2, 4, 1, 3]), torch.tensor([2, 4, 5, 3, 5])
    assert chain_heads(before, after, 6).tolist() == [0] * 6
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        before, after = torch.randint(0, 30, (2, 20), generator=generator)
        label = list(range(30))
        for left, right in zip(before.tolist(), after.tolist(), strict=True):
            low, high = sorted((label[left], label[right]))
            label = [low if own == high else own for own in label]
        assert chain_heads(before, after, 30).tolist() == label


def test_halving_loses_nothing() -> None:
    maps = torch.rand(2, 5, 6, 3, generator=torch.Generator().manual_seed(0))
    halved = halved_sum(maps)
    assert halved.shape == (2, 3, 3, 3)
    assert torch.allclose(halved.sum(dim=(1, 2)), maps.sum(dim=(1, 2)))
    assert torch.equal(halved[:, 0, 0], maps[:, 0, :2].sum(dim=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.2}, "threshold=1.2 must be a cosine similarity"),
        ({"temporal": -1.2}, "temporal=-1.2 must be a cosine similarity"),
        ({"root_level": -1}, "root_level=-1 must be an int of at least 0"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("sttm").method(**options)
