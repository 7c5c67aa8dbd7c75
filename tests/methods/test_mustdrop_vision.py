"""MustDrop's vision stage: which windows are merged, and what is dropped after them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.before_llm.mustdrop_vision import whole_windows, window_similarity
from mmfast.token_pruning.encoder_base import GROUPS, EncoderTokens
from mmfast.tokens import Layout, VisualTokens

MERGE = "mustdrop_vision"


def grid(values: list[list[float]]) -> Tensor:
    """Features whose direction is the value, one per place of a grid."""
    angle = torch.tensor(values).flatten()
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


# A 4 x 5 grid: the left windows are of one colour each, the right ones mixed, the last column belongs to none.
FEATURES = grid([[0, 0, 1, 2, 9], [0, 0, 3, 0, 9], [1, 1, 0, 3, 9], [1, 1, 2, 1, 9]])
ATTENTION = torch.linspace(0.1, 1.0, 20)


def tokens(attention: Tensor = ATTENTION, **signals: Tensor) -> VisualTokens:
    return VisualTokens(FEATURES, Layout.grid(4, 5), signals={"cls_attention": attention, **signals})


def test_windows_of_one_colour_are_merged_and_the_least_seen_dropped() -> None:
    decision = get(MERGE).method(keep=10, window=2, threshold=0.99)(tokens())
    # 20 - 2 * 3 = 14 tokens are left; a merged one is seen as much as its patches are on average (.34, .82).
    assert len(decision) == 10
    assert decision.source[[0, 1, 5, 6]].unique().tolist() == [-1]
    assert decision.source[[10, 11, 15, 16]].unique().numel() == 1
    merged = int(decision.source[10])
    assert decision.indices[merged] == 11
    assert decision.sizes[merged] == 4.0
    assert torch.allclose(decision.features[merged], FEATURES[10])
    assert (decision.source < 0).sum() == 20 - 4 - 9


def test_no_more_windows_are_merged_than_leaves_enough() -> None:
    decision = get(MERGE).method(keep=16, window=2, threshold=-1.0)(tokens())
    assert len(decision) == 16
    assert sorted(decision.sizes.tolist()) == [1.0] * 15 + [4.0]
    # The most similar window of all; of equal ones the earlier.
    assert decision.source[[0, 1, 5, 6]].unique().numel() == 1


def test_merged_in_the_encoder_nothing_is_merged_again() -> None:
    groups = torch.arange(20)
    groups[[0, 1, 5, 6]] = 0
    own = tokens(ATTENTION.flip(0), **{GROUPS: groups})
    decision = get(MERGE).method(keep=3, window=2, threshold=-1.0, where="encoder")(own)
    assert decision.indices.tolist() == [0, 2, 3]
    assert decision.sizes.tolist() == [4.0, 1.0, 1.0]
    assert decision.source.tolist() == [0, 0, 1, 2, -1, 0, 0] + [-1] * 13


def test_the_class_token_is_in_no_window() -> None:
    hidden = torch.cat([torch.full((1, 2), 7.0), FEATURES])
    own = EncoderTokens(hidden, hidden, torch.ones(21), (4, 5), class_token=True)
    places, source = get(MERGE).method(window=2, threshold=0.99).merge_block(own, 2)
    assert len(places) == 15
    assert (places[0], source[0]) == (0, 0)
    assert (source == 0).sum() == 1
    # The merged windows come first, the earlier of equal ones first.
    assert source[[1, 2, 6, 7]].tolist() == [1] * 4
    assert source[[11, 12, 16, 17]].tolist() == [2] * 4


def test_windows_stay_inside_their_tile() -> None:
    layout = Layout.grid(3, 3, frames=2)
    assert whole_windows(layout, 3).tolist() == [list(range(9)), list(range(9, 18))]
    assert whole_windows(layout, 2).tolist() == [[0, 1, 3, 4], [9, 10, 12, 13]]
    assert whole_windows(Layout.unknown(9), 2).shape == (0, 4)


def test_similarity_is_the_mean_over_pairs() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    # Of the six pairs one is opposite, the others are at right angles or have no direction.
    assert window_similarity(features, torch.tensor([[0, 1, 2, 3]])).item() == pytest.approx(-1 / 6)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 2.0}, {"threshold": 1.5}, {"threshold": True}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    (field,) = options
    with pytest.raises(ValueError, match=f"{field}="):
        get(MERGE).method(**options)
