"""TRIM: the mean of the rest and its place, and the count that the data decide."""

from __future__ import annotations

import pytest
import torch

from mmfast.registry import get
from mmfast.tokens import Keep, VisualTokens

FEATURES = torch.tensor([[4.0, 0.0], [1.0, 5.0], [3.0, 1.0], [0.0, 2.0], [2.0, 5.0]])
TEXT = torch.tensor([[1.0, 0.0], [3.0, 0.0]])


def reduced(tokens: VisualTokens, **options: object) -> Keep:
    decision: Keep | None = get("trim").method(**options)(tokens)
    assert decision is not None
    return decision


def test_the_mean_of_the_rest_stands_where_the_last_of_it_stood() -> None:
    decision = reduced(VisualTokens.from_features(FEATURES, text_embeds=TEXT), keep=3)
    assert decision.indices.tolist() == [0, 2, 4]
    assert decision.features is not None
    assert decision.features.tolist() == [[4.0, 0.0], [3.0, 1.0], [1.0, 4.0]]
    assert decision.sizes is not None
    assert decision.sizes.tolist() == [1.0, 1.0, 3.0]
    assert decision.source is not None
    assert decision.source.tolist() == [0, 2, 1, 2, 2]


def test_the_mean_may_stand_between_kept_tokens() -> None:
    decision = reduced(VisualTokens.from_features(FEATURES.flip(0), text_embeds=TEXT), keep=3)
    assert decision.indices.tolist() == [2, 3, 4]
    assert decision.features is not None
    # Tokens 2 and 4 stay, the others end at token 3.
    assert decision.features[:, 0].tolist() == [3.0, 1.0, 4.0]


def test_one_place_is_the_mean_of_everything() -> None:
    decision = reduced(VisualTokens.from_features(FEATURES, text_embeds=TEXT), keep=1)
    assert decision.indices.tolist() == [4]
    assert decision.features is not None
    torch.testing.assert_close(decision.features, FEATURES.mean(dim=0, keepdim=True))


def test_in_clip_what_resembles_the_question_least_stays() -> None:
    signals = {"clip_image_embeds": FEATURES, "clip_text_embeds": TEXT, "text_embeds": TEXT}
    decision = reduced(VisualTokens.from_features(FEATURES, **signals), keep=3, relevance="clip")
    assert decision.indices.tolist() == [1, 3, 4]


def test_outstanding_scores_decide_the_count() -> None:
    """Two of 20 tokens point where the text does, the others away from it."""
    features = torch.tensor([[-1.0, 0.1]]).repeat(20, 1)
    features[[3, 11]] = torch.tensor([1.0, 0.0])
    decision = reduced(VisualTokens.from_features(features, text_embeds=TEXT))
    assert decision.indices.tolist() == [3, 11, 19]
    even = reduced(VisualTokens.from_features(torch.ones(20, 2), text_embeds=TEXT))
    assert even.indices.tolist() == [19]


def test_encoder_features_are_merged_where_single_patches_are_projected() -> None:
    patches = torch.arange(10.0)[:, None]
    plain = VisualTokens.from_features(torch.ones(10, 2), text_embeds=TEXT, patch_features=patches)
    tokens = VisualTokens(plain.features, plain.layout, signals=plain.signals, projectable=True)
    decision = reduced(tokens, keep=3)
    assert decision.space == "vision"
    assert decision.features is not None
    assert decision.features.flatten().tolist() == [0.0, 1.0, 5.5]


def test_clip_relevance_needs_a_clip_model() -> None:
    method = get("trim").method(keep=2, relevance="clip")
    assert method.wants_clip
    with pytest.raises(ValueError, match=r"accelerate\(model, plan, clip="):
        method(VisualTokens.from_features(FEATURES, text_embeds=TEXT))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="relevance='bert' must be one of"):
        get("trim").method(relevance="bert")
