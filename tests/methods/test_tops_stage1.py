"""TOPS, stage I: the running sums against plain ones, and the cases the vectors leave out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.registry import get
from mmfast.token_pruning import similarity
from mmfast.token_pruning.before_llm.tops_stage1 import balanced_order


def plain_order(features: torch.Tensor, attention: torch.Tensor, kept: int, alpha: float, lam: float) -> list[int]:
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    cosine, saliency = unit @ unit.T, attention.double()
    picks = [int(saliency.argmax())]
    while len(picks) < kept:
        rest = [i for i in range(len(features)) if i not in picks]
        nearest = cosine[rest][:, picks].amax(dim=1)
        diversity = 1 - nearest
        coverage = (cosine[rest][:, rest] - nearest).clamp_min(0).sum(dim=1)
        own = saliency[rest]
        score = own / own.mean() + alpha * diversity / diversity.mean() + lam * coverage / coverage.mean()
        picks.append(rest[int(score.argmax())])
    return picks


@pytest.mark.parametrize(("alpha", "lam"), [(0.5, 0.5), (0.0, 1.0), (2.0, 0.0)])
def test_running_sums_match_plain_ones(alpha: float, lam: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features, attention = torch.randn(90, 6, generator=generator), torch.rand(90, generator=generator)
    order = balanced_order(features, attention, 60, alpha, lam)
    assert order.tolist() == plain_order(features, attention, 60, alpha, lam)
    monkeypatch.setattr(similarity, "MATRIX_LIMIT", 0)
    monkeypatch.setattr(similarity, "_BLOCK_ELEMENTS", 200)
    assert balanced_order(features, attention, 60, alpha, lam).equal(order)


@settings(deadline=None)
@given(total=st.integers(1, 40), copies=st.integers(1, 3), seed=st.integers(0, 5), zero=st.booleans())
def test_all_tokens_can_be_picked_once(total: int, copies: int, seed: int, zero: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(total, 3, generator=generator).repeat(copies, 1)
    attention = torch.zeros(total * copies) if zero else torch.rand(total * copies, generator=generator)
    order = balanced_order(features, attention, total * copies, 0.5, 0.5)
    assert sorted(order.tolist()) == list(range(total * copies))


@pytest.mark.parametrize("name", ["alpha", "lam"])
def test_bad_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1 must be a number of at least 0"):
        get("tops_stage1").method(**{name: -1})
