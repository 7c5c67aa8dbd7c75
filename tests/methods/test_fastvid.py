"""FastVID: segments, salient tokens and anchors, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmfast
from mmfast.registry import get
from mmfast.token_pruning.before_llm.fastvid import absorb, anchor_counts, official_anchor_counts, segment_lengths
from mmfast.tokens import Keep, Layout, VisualTokens
from support.checks import generate
from support.families import FAMILIES


def clip(frames: int, places: int, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.grid(1, places, frames=frames, modality="video")
    signals = {"cls_attention": torch.rand(frames * places, generator=generator)}
    return VisualTokens(torch.randn(frames * places, 6, generator=generator), layout, signals=signals)


def decided(tokens: VisualTokens, **options: object) -> Keep:
    return get("fastvid").method(**options)(tokens)


def test_salient_tokens_stay_as_they_are_and_the_rest_is_averaged() -> None:
    # Two places that look alike in both frames, and one of high attention.
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0], [1.0, 0.1], [0.1, 2.0], [5.0, 4.0]])
    signals = {"cls_attention": torch.tensor([0.1, 0.1, 0.9, 0.1, 0.1, 0.9])}
    video = VisualTokens(features, Layout.grid(1, 3, frames=2, modality="video"), signals=signals)
    decision = decided(video, keep=4, segments=1, threshold=0.5, context=0.5, weight=0.25)
    # One of each frame's two goes to anchors, and the last frame holds them all.
    assert decision.indices.tolist() == [2, 3, 4, 5]
    assert decision.features[[0, 3]].equal(features[[2, 5]])
    assert decision.source.tolist() == [1, 2, 0, 1, 2, 3]
    assert decision.sizes.tolist() == [1.0, 2.0, 2.0, 1.0]
    # Both tokens of a place are averaged, and the anchor once more: a third of the weight is its own.
    assert torch.allclose(decision.features[1], (2 * features[3] + features[0]) / 3)


def test_every_token_goes_to_its_most_similar_anchor() -> None:
    tokens = clip(9, 7)
    decision = decided(tokens, keep=0.6, segments=1, threshold=-1.0, stride=2)
    assert decision.source.min() >= 0
    assert decision.source[decision.indices].tolist() == list(range(len(decision)))
    assert decision.sizes.sum() == len(tokens)


def test_frames_without_anchors_are_dropped_but_for_the_salient() -> None:
    tokens = clip(4, 5)
    decision = decided(tokens, keep=8, context=0.0)
    assert decision.features.equal(tokens.features[decision.indices])
    assert int((decision.source >= 0).sum()) == 8


@settings(deadline=None)
@given(
    frames=st.integers(1, 7),
    places=st.integers(1, 9),
    keep=st.floats(0.02, 1.0),
    segments=st.integers(1, 9),
    context=st.floats(0.0, 1.0),
    stride=st.integers(1, 6),
)
def test_counts_are_exact(frames: int, places: int, keep: float, segments: int, context: float, stride: int) -> None:
    tokens = clip(frames, places)
    method = get("fastvid").method(keep=keep, segments=segments, context=context, stride=stride)
    decision = method(tokens)
    assert decision is None or len(decision) == method.keep_count(len(tokens))


def test_cuts_are_made_where_frames_differ_most() -> None:
    turn = torch.tensor([0.0, 0.1, 0.9, 1.0, 1.05, 2.0])
    vectors = torch.stack([turn.cos(), turn.sin()], dim=-1)
    assert segment_lengths(vectors, 1, 0.5) == [6]
    assert segment_lengths(vectors, 2, 0.5) == [5, 1]
    assert segment_lengths(vectors, 1, 0.9) == [2, 3, 1]
    assert segment_lengths(vectors, 50, 0.9) == [1] * 6
    assert segment_lengths(vectors[:1], 8, 0.9) == [1]


def test_more_frames_hold_anchors_where_the_usual_ones_are_too_small() -> None:
    assert anchor_counts([3] * 8, 6, 4) == [0, 0, 0, 3, 0, 0, 0, 3]
    assert anchor_counts([3] * 8, 7, 4) == [0, 3, 0, 0, 2, 0, 0, 2]
    assert anchor_counts([1, 5], 6, 1) == [1, 5]
    assert anchor_counts([4, 4], 0, 2) == [0, 0]


def test_the_official_code_cuts_off_and_mistakes_small_shares() -> None:
    assert official_anchor_counts(3, 3, 2) == [4, 0, 4]
    # With a stride of one each frame holds its own share, and is taken for a segment of its own.
    tokens = clip(3, 4)
    options = {"keep": 9, "segments": 1, "threshold": -1.0, "stride": 1, "context": 0.4}
    official, ours = (decided(tokens, **options, compat=compat) for compat in ("official", None))
    assert official.indices.equal(ours.indices)
    assert (official.indices[official.source] // 4).equal(tokens.layout.frame)
    assert not official.features.equal(ours.features)


def test_an_anchor_keeps_its_weight() -> None:
    anchors, tokens = torch.zeros(1, 1), torch.full((4, 1), 5.0)
    owner = torch.zeros(4, dtype=torch.int64)
    assert absorb(anchors, tokens, owner, 0.6).item() == pytest.approx(2.0)
    assert absorb(anchors, tokens, owner, 0.0).item() == pytest.approx(4.0)
    assert absorb(anchors, tokens, owner, 1.0).item() == 0.0


def test_frames_may_be_compared_by_their_class_token() -> None:
    tokens = clip(4, 6)
    method = get("fastvid").method(keep=12, segments=2, threshold=-1.0, frames_by="class_token")
    assert "cls_features" in method.needs
    assert "cls_features" in method.vision_signals()
    assert "cls_features" not in get("fastvid").method().needs
    late, early = torch.eye(2)[[0, 0, 0, 1]], torch.eye(2)[[0, 1, 1, 1]]
    found = [
        method(replace(tokens, signals={**tokens.signals, "cls_features": vectors})).indices.tolist()
        for vectors in (late, early)
    ]
    assert found[0] != found[1]
    # An image has nothing to compare.
    image = replace(tokens, layout=Layout.grid(4, 6), signals={**tokens.signals, "cls_features": late[:1]})
    assert len(method(image)) == 12


def test_class_tokens_come_from_encoders_that_have_them() -> None:
    plan = "fastvid(keep=0.4, frames_by='class_token')"
    family = FAMILIES["video_llava"]
    with mmfast.accelerate(family.model(), plan) as fast:
        generate(family.model(), family.batch([3, family.video(1), 4]).inputs, 2)
        (record,) = fast.report().media
    assert record.entered == round(0.4 * record.tokens)
    with pytest.raises(ValueError, match="no class token"):
        mmfast.accelerate(FAMILIES["llava_onevision"].model(), plan)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("segments", 0),
        ("stride", 2.0),
        ("threshold", 1.5),
        ("context", -0.1),
        ("weight", True),
        ("frames_by", "cls"),
        ("compat", "paper"),
    ],
)
def test_bad_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        get("fastvid").method(**{field: value})
