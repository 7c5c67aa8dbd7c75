"""MMTok: the lazy search against the plain one, and tokens that may not be picked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning import similarity
from mmfast.token_pruning.before_llm.mmtok import best_cover, coverage
from mmfast.tokens import VisualTokens


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_cover(weights: Tensor, kept: int) -> list[int]:
    exact = weights.double()
    covered = torch.zeros(weights.shape[1], dtype=torch.float64)
    picks: list[int] = []
    for _ in range(kept):
        gain = (exact - covered).clamp_min(0).sum(dim=1)
        gain[picks] = -1.0
        picks.append(int(gain.argmax()))
        covered = torch.maximum(covered, exact[picks[-1]])
    return picks


@pytest.mark.parametrize("candidates", [1, 3, 64])
def test_lazy_search_matches_the_plain_one(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfast.kernels.greedy_cover.reference.CANDIDATES", candidates)
    weights = coverage(drawn(90, 8), drawn(90, 5, seed=1), drawn(7, 8, seed=2), 0.5, (0.2, 0.2))
    assert best_cover(weights, 40).tolist() == plain_cover(weights, 40)


def test_weights_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = drawn(30, 8), drawn(30, 5, seed=1), drawn(7, 8, seed=2), 0.5, (0.02, 0.2)
    whole = coverage(*arguments)
    monkeypatch.setattr(similarity, "_BLOCK_ELEMENTS", 90)
    torch.testing.assert_close(coverage(*arguments), whole)
    torch.testing.assert_close(whole[:, :7].sum(), torch.tensor(1.0))
    torch.testing.assert_close(whole[:, 7:].sum(), torch.tensor(0.5))


@settings(deadline=None)
@given(total=st.integers(1, 30), copies=st.integers(1, 3), words=st.integers(0, 3), seed=st.integers(0, 5))
def test_all_tokens_can_be_picked_once(total: int, copies: int, words: int, seed: int) -> None:
    features = drawn(total, 3, seed=seed).repeat(copies, 1)
    order = best_cover(coverage(features, features, drawn(words, 3, seed=9), 0.5, (0.02, 0.2)), total * copies)
    assert sorted(order.tolist()) == list(range(total * copies))


def test_without_any_gain_the_lowest_index_is_next() -> None:
    assert best_cover(torch.zeros(4, 3), 4).tolist() == [0, 1, 2, 3]
    assert best_cover(torch.ones(3, 2), 3).tolist() == [0, 1, 2]


def test_excluded_tokens_are_never_picked() -> None:
    weights = torch.tensor([[0.9, 0.9], [0.1, 0.0], [0.0, 0.2]])
    assert best_cover(weights, 1).tolist() == [0]
    assert best_cover(weights, 2, torch.tensor([0])).tolist() == [2, 1]
    assert best_cover(weights, 3, torch.tensor([0])).tolist() == [2, 1]


def test_words_find_their_token_first() -> None:
    """Five alike tokens cover the image best, but two words name the two others."""
    features = torch.cat([torch.tensor([[1.0, 0.0, 0.0]]).repeat(5, 1), torch.eye(3)[1:]])
    words = torch.eye(3)[1:]
    asked = VisualTokens.from_features(features, patch_features=features, text_embeds=words)
    decision = get("mmtok").method(keep=2, visual_temperature=0.02)(asked)
    assert decision is not None
    assert decision.indices.tolist() == [5, 6]
    decision = get("mmtok").method(keep=1, alpha=100.0, visual_temperature=0.2)(asked)
    assert decision is not None
    assert decision.indices.tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha=-1.0 must be 0 or more"),
        ({"text_temperature": 0.0}, "text_temperature=0.0 must be above 0"),
        ({"visual_temperature": -0.1}, "visual_temperature=-0.1 must be above 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("mmtok").method(**options)
