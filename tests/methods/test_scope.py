"""SCOPE: the lazy search against the plain one, and the cases the official vectors leave out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.registry import get
from mmfast.token_pruning import similarity
from mmfast.token_pruning.before_llm.scope import coverage_order


def plain_order(features: torch.Tensor, saliency: torch.Tensor, kept: int, combine: str) -> list[int]:
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    cosine = unit @ unit.T
    covered = torch.zeros(len(features), dtype=torch.float64)
    picks: list[int] = []
    for _ in range(kept):
        gain = (cosine - covered[:, None]).clamp_min(0).sum(dim=0)
        score = gain * saliency if combine == "multi" else gain + saliency
        score[picks] = -torch.inf
        picks.append(int(score.argmax()))
        covered = torch.maximum(covered, cosine[:, picks[-1]])
    return picks


@pytest.mark.parametrize("combine", ["multi", "add"])
@pytest.mark.parametrize("candidates", [1, 3, 64])
def test_lazy_search_matches_the_plain_one(combine: str, candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfast.kernels.greedy_cover.reference.CANDIDATES", candidates)
    generator = torch.Generator().manual_seed(0)
    features, saliency = torch.randn(90, 5, generator=generator), torch.rand(90, generator=generator)
    order = coverage_order(features, saliency, 40, combine)
    assert order.tolist() == plain_order(features, saliency, 40, combine)
    monkeypatch.setattr(similarity, "MATRIX_LIMIT", 0)
    assert coverage_order(features, saliency, 40, combine).equal(order)


@settings(deadline=None)
@given(total=st.integers(1, 40), copies=st.integers(1, 3), seed=st.integers(0, 5), zero=st.booleans())
def test_all_tokens_can_be_picked_once(total: int, copies: int, seed: int, zero: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(total, 3, generator=generator).repeat(copies, 1)
    saliency = torch.zeros(total * copies) if zero else torch.rand(total * copies, generator=generator)
    order = coverage_order(features, saliency, total * copies)
    assert sorted(order.tolist()) == list(range(total * copies))


def test_without_any_gain_the_lowest_index_is_next() -> None:
    assert coverage_order(torch.eye(5), torch.zeros(5), 5).tolist() == [0, 1, 2, 3, 4]
    assert coverage_order(torch.ones(5, 3), torch.tensor([0.1, 0.1, 0.3, 0.1, 0.1]), 4).tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": -0.5}, "alpha=-0.5 must be"), ({"combine": "max"}, "combine='max' must be one of")],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("scope").method(**options)
