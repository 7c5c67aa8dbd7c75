"""ToMe: sizes, rounds and places, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.kernels import rows
from mmfast.registry import get
from mmfast.token_pruning.before_llm.tome import match_rounds
from mmfast.token_pruning.encoder_base import GROUPS, EncoderTokens
from mmfast.token_pruning.similarity import halvings
from mmfast.tokens import Layout, VisualTokens

# Two directions, slightly apart: 0 and 1 belong together, 2 and 3 do.
PAIRS = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.1, 3.0]])


def test_pairs_are_averaged_by_size() -> None:
    # Tokens 0 and 2 were merged in the encoder before, and each stands for two places.
    layout = Layout.grid(1, 6)
    signals = {GROUPS: torch.tensor([5, 5, 1, 0, 0, 3])}
    features = PAIRS[[0, 0, 1, 2, 2, 3]]
    decision = get("tome").method(keep=2)(VisualTokens(features, layout, signals=signals))
    # Numbers mean nothing: the groups come in the order of their places, so 0 and 1 are neighbours, and 2 and 3.
    assert decision.sizes.tolist() == [3.0, 3.0]
    assert decision.source.tolist() == [0, 0, 0, 1, 1, 1]
    expected = torch.stack([(2 * PAIRS[0] + PAIRS[1]) / 3, (2 * PAIRS[2] + PAIRS[3]) / 3])
    assert torch.allclose(decision.features, expected)


def test_a_merged_token_stands_where_the_others_joined() -> None:
    decision = get("tome").method(keep=3)(VisualTokens.from_features(PAIRS))
    # The closest pair is 0 and 1, and even tokens join odd ones.
    assert decision.indices.tolist() == [1, 2, 3]
    assert decision.features[0].tolist() == [3.0, 0.0]
    assert decision.source.tolist() == [0, 0, 1, 2]
    assert decision.sizes.tolist() == [2.0, 1.0, 1.0]


def test_the_class_token_stays_first_and_alone() -> None:
    keys = torch.ones(7, 3)
    own = EncoderTokens(keys, keys, torch.ones(7), (2, 3), class_token=True)
    for left in range(2, 7):
        places, source = get("tome").method(keep=2).merge_block(own, left)
        assert len(places) == left
        assert places[0] == 0
        assert (source == 0).tolist() == [True] + [False] * 6


@settings(deadline=None)
@given(total=st.integers(1, 40), left=st.integers(1, 40), class_token=st.booleans(), same=st.booleans())
def test_rounds_leave_exactly_what_was_asked_for(total: int, left: int, class_token: bool, same: bool) -> None:
    left = min(left + class_token, total)
    metric = torch.ones(total, 2) if same else torch.randn(total, 2, generator=torch.Generator().manual_seed(total))
    rounds = halvings(total, left, protected=int(class_token))
    places, source = match_rounds(metric, rounds, class_token=class_token)
    assert len(places) == left == places.unique().numel()
    assert source[places].tolist() == list(range(left))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = torch.randn(101, 5, generator=torch.Generator().manual_seed(0))
    expected = match_rounds(metric, [30])
    monkeypatch.setattr(rows, "BLOCK_ELEMENTS", 200)
    assert all(torch.equal(*pair) for pair in zip(match_rounds(metric, [30]), expected, strict=True))


def test_ties_go_to_the_earlier_token() -> None:
    places, source = match_rounds(torch.ones(6, 2), [2])
    # All pairs are alike: the first two even tokens join the first odd one.
    assert source.tolist() == [1, 1, 1, 2, 0, 3]
    assert places.tolist() == [4, 1, 3, 5]


def test_merges_are_spread_over_the_blocks() -> None:
    schedule = get("tome").method(keep=4).schedule(6, 16, 4)
    assert list(schedule.values()) == [14, 12, 10, 8, 6, 4]
    assert list(schedule) == list(range(6))
    assert get("tome").method(keep=15).schedule(3, 16, 15) == {0: 16, 1: 16, 2: 15}


@pytest.mark.parametrize(("options", "field"), [({"where": "inside"}, "where"), ({"proportional": 1}, "proportional")])
def test_bad_options_are_refused(options: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        get("tome").method(**options)
