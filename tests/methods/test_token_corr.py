"""Token-level correlation: a case worked out by hand, and what must hold for any draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmfast.registry import get
from mmfast.token_pruning.before_llm.token_corr import sampling_keys
from mmfast.tokens import VisualTokens

KEYS = torch.tensor([[1.0, 0.0, 0.0]] * 6 + [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
SHALLOW = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.05, 0.07])
DEEP = torch.tensor([0.01, 0.02, 0.01, 0.02, 0.01, 0.02, 0.9, 0.02])


def tokens(index: int = 0) -> VisualTokens:
    found = VisualTokens.from_features(torch.ones(8, 2), keys=KEYS, shallow=SHALLOW, deep=DEEP)
    return VisualTokens(found.features, found.layout, index, found.signals)


def test_the_quota_is_what_is_not_repeated() -> None:
    """Six alike patches each repeat five others, more than an eighth of eight; two stand alone."""
    decision = get("token_corr").method(deterministic=True)(tokens())
    assert decision is not None
    # The outlier of the deep block, then the best of the shallow one.
    assert decision.indices.tolist() == [5, 6]


def test_outliers_come_first_and_the_best_fill_up() -> None:
    for kept, wanted in ((1, [6]), (3, [4, 5, 6]), (7, [0, 1, 2, 3, 4, 5, 6])):
        decision = get("token_corr").method(keep=kept, deterministic=True)(tokens())
        assert decision is not None
        assert decision.indices.tolist() == wanted


def test_draws_follow_from_the_seed_and_the_image() -> None:
    def draw(seed: int, index: int = 0) -> list[int]:
        decision = get("token_corr").method(keep=3, seed=seed)(tokens(index))
        assert decision is not None
        assert 6 in decision.indices
        return decision.indices.tolist()

    assert draw(0) == draw(0)
    assert len({tuple(draw(seed)) for seed in range(20)}) > 3
    assert len({tuple(draw(0, index)) for index in range(20)}) > 3


def test_likely_patches_are_drawn_more_often() -> None:
    drawn = torch.zeros(8)
    for seed in range(400):
        decision = get("token_corr").method(keep=2, seed=seed)(tokens())
        assert decision is not None
        drawn[decision.indices] += 1
    # Shares of the shallow attention among the seven that are no outliers.
    wanted = SHALLOW.clone()
    wanted[6] = 0.0
    wanted = 400 * wanted / wanted.sum()
    wanted[6] = 400.0
    assert (drawn - wanted).abs().max() < 45


@pytest.mark.parametrize("deterministic", [True, False])
def test_outliers_beyond_the_count_go_by_the_deep_block(deterministic: bool) -> None:
    deep = torch.tensor([0.0] * 10 + [0.7, 0.9, 0.8])
    found = VisualTokens.from_features(torch.ones(13, 2), keys=torch.eye(13), shallow=torch.ones(13), deep=deep)
    decision = get("token_corr").method(keep=2, deterministic=deterministic)(found)
    assert decision is not None
    assert decision.indices.tolist() == [11, 12]


def test_a_blank_page_keeps_one_token() -> None:
    same = {"keys": torch.ones(9, 4), "shallow": torch.full((9,), 0.1), "deep": torch.full((9,), 0.1)}
    decision = get("token_corr").method()(VisualTokens.from_features(torch.ones(9, 2), **same))
    assert decision is not None
    assert len(decision) == 1


def test_patches_without_weight_are_drawn_last() -> None:
    weights = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    for seed in range(50):
        best = sampling_keys(weights, seed).sort(descending=True).indices[:2]
        assert sorted(best.tolist()) == [1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": 1.0}, "similarity=1.0 must lie in"),
        ({"repeats": 0.0}, "repeats=0.0 must lie in"),
        ({"scope": "per_tile"}, "keep=None counts over the whole image"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("token_corr").method(**options)
