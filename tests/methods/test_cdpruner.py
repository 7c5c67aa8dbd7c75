"""CDPruner: the greedy search against determinants, and the cases the official code divides by zero in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.before_llm.cdpruner import likeliest_subset, scaled_relevance
from mmfast.tokens import VisualTokens


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept_of(tokens: VisualTokens, **options: Any) -> list[int]:
    decision = get("cdpruner").method(**options)(tokens)
    assert decision is not None
    kept: list[int] = decision.indices.tolist()
    return kept


def test_each_pick_has_the_largest_determinant() -> None:
    features, relevance = drawn(14, 20).double(), torch.rand(14, generator=torch.Generator().manual_seed(1)).double()
    unit = torch.nn.functional.normalize(features, dim=-1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    picks: list[int] = []
    for _ in range(9):
        rest = [place for place in range(14) if place not in picks]
        picks.append(max(rest, key=lambda place: float(torch.linalg.det(kernel[[*picks, place]][:, [*picks, place]]))))
    assert likeliest_subset(features, relevance, 9).tolist() == picks


def test_when_no_direction_is_left_the_first_tokens_follow() -> None:
    """Two directions: after the best token of each, nothing is left to gain, and the others follow in order."""
    features = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 3)
    relevance = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.7, 0.3, 0.6])
    assert likeliest_subset(features, relevance, 7).tolist() == [1, 4, 0, 2, 3, 5, 6]


@settings(deadline=None)
@given(
    total=st.integers(1, 30), width=st.integers(1, 6), seed=st.integers(0, 5), scale=st.sampled_from([0.0, 1e-20, 1.0])
)
def test_all_tokens_can_be_picked_once(total: int, width: int, seed: int, scale: float) -> None:
    relevance = torch.rand(total, generator=torch.Generator().manual_seed(seed))
    order = likeliest_subset(scale * drawn(total, width, seed=seed), relevance, total)
    assert sorted(order.tolist()) == list(range(total))


def test_even_relevance_leaves_diversity_alone() -> None:
    assert scaled_relevance(torch.full((5,), -0.3)).tolist() == [1.0] * 5
    features = drawn(12, 6)
    even = VisualTokens.from_features(features, text_embeds=torch.zeros(2, 6))
    wordless = VisualTokens.from_features(features, text_embeds=torch.zeros(0, 6))
    asked = VisualTokens.from_features(features, text_embeds=drawn(2, 6, seed=4))
    plain = likeliest_subset(features, torch.ones(12), 4).sort().values.tolist()
    assert kept_of(even, keep=4) == kept_of(wordless, keep=4) == kept_of(asked, keep=4, relevance_weight=0.0) == plain
    assert kept_of(asked, keep=4, relevance_weight=1.0) != plain


def test_likeness_to_the_text_counts_for_and_in_clip_against() -> None:
    """Orthogonal tokens: only relevance tells them apart."""
    text = torch.tensor([[0.0, 3.0, 1.0, 0.0]])
    tokens = VisualTokens.from_features(
        torch.eye(4), text_embeds=text, clip_image_embeds=torch.eye(4), clip_text_embeds=text
    )
    assert kept_of(tokens, keep=2) == [1, 2]
    assert kept_of(tokens, keep=2, relevance="clip") == [0, 3]


def test_theta_sharpens_relevance() -> None:
    """A token like the best one, and a less relevant one unlike it."""
    features = torch.tensor([[1.0, 0.0], [0.9, 0.436], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.25]])
    tokens = VisualTokens.from_features(features, text_embeds=text)
    assert kept_of(tokens, keep=2) == [1, 2]
    assert kept_of(tokens, keep=2, theta=0.9) == [0, 1]


def test_clip_relevance_needs_a_clip_model() -> None:
    tokens = VisualTokens.from_features(torch.eye(4), text_embeds=torch.ones(1, 4))
    method = get("cdpruner").method(keep=2, relevance="clip")
    assert method.wants_clip
    assert not get("cdpruner").method().wants_clip
    with pytest.raises(ValueError, match=r"accelerate\(model, plan, clip="):
        method(tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relevance": "bert"}, "relevance='bert' must be one of"),
        ({"relevance_weight": 1.5}, "relevance_weight=1.5 must lie in"),
        ({"theta": 1.0}, "theta=1.0 must be None or lie in"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("cdpruner").method(**options)
