"""VisionZip: what the official vectors do not say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.registry import get
from mmfast.token_pruning.before_llm.visionzip import merge_contextual
from mmfast.tokens import Layout, VisualTokens


def random_tokens(total: int, seed: int = 0, *, tiles: int = 1, projectable: bool = True) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    signals = {
        "cls_attention": torch.rand(total, generator=generator),
        "keys": torch.randn(total, 4, generator=generator),
        "patch_features": torch.randn(total, 6, generator=generator),
        "cls_features": torch.randn(tiles, 6, generator=generator),
    }
    features = torch.randn(total, 3, generator=generator)
    return VisualTokens(features, Layout.unknown(total), signals=signals, projectable=projectable)


@settings(deadline=None)
@given(
    total=st.integers(2, 40),
    kept=st.integers(1, 39),
    contextual=st.one_of(st.integers(0, 50), st.floats(0, 0.99)),
    compat=st.sampled_from([None, "official"]),
)
def test_exactly_keep_survive(total: int, kept: int, contextual: float, compat: str | None) -> None:
    method = get("visionzip").method(keep=kept, contextual=contextual, compat=compat)
    decision = method(random_tokens(total))
    if kept >= total:
        assert decision is None
        return
    assert len(decision) == kept == len(decision.features)
    assert bool(decision.features.isfinite().all())
    joined = decision.source[decision.source >= 0]
    count = torch.bincount(joined, minlength=kept).float()
    if compat == "official":
        # The class token stands for itself, and no visual token joins it.
        assert int(count[0]) == 0
        count[0] = 1
    assert count.equal(decision.sizes)
    if method.contextual_count(kept) > 0:
        assert joined.numel() == total


def test_mean_averages_where_add_doubles() -> None:
    features, keys = torch.tensor([[2.0], [4.0], [6.0]]), torch.ones(3, 2)
    assert merge_contextual(features, keys, 1, "add")[1].tolist() == [[7.0]]
    assert merge_contextual(features, keys, 1, "mean")[1].tolist() == [[4.0]]


def test_a_target_nobody_joins_stays_as_it_is() -> None:
    features, keys = torch.tensor([[2.0], [4.0], [6.0], [8.0]]), torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]])
    targets, merged, joined = merge_contextual(features, keys, 2)
    assert (targets.tolist(), joined.tolist(), merged.tolist()) == ([0, 2], [0, 0, 1, 0], [[8.0], [6.0]])


def test_ties_go_to_the_earlier_token() -> None:
    tokens = random_tokens(12)
    tokens.signals["cls_attention"][:] = 0.0
    assert get("visionzip").method(keep=4, contextual=0)(tokens).indices.tolist() == [0, 1, 2, 3]


def test_merges_in_the_space_the_projector_reads() -> None:
    decision = get("visionzip").method(keep=5)(random_tokens(12))
    assert (decision.space, decision.features.shape) == ("vision", (5, 6))
    decision = get("visionzip").method(keep=5)(random_tokens(12, projectable=False))
    assert (decision.space, decision.features.shape) == ("llm", (5, 3))


def test_official_needs_one_class_token_and_a_projector_token_by_token() -> None:
    method = get("visionzip").method(keep=5, compat="official")
    assert "cls_features" in method.needs
    assert "cls_features" in method.vision_signals()
    for tokens in (random_tokens(12, tiles=2), random_tokens(12, projectable=False)):
        with pytest.raises(ValueError, match="needs one tile and a projector that works token by token"):
            method(tokens)


@pytest.mark.parametrize("contextual", [-1, 1.0, float("nan"), -0.1])
def test_bad_counts_are_refused(contextual: float) -> None:
    with pytest.raises(ValueError, match="contextual="):
        get("visionzip").method(contextual=contextual)


@pytest.mark.parametrize("contextual", [True, "10"])
def test_bad_types_are_refused(contextual: object) -> None:
    with pytest.raises(TypeError, match="contextual="):
        get("visionzip").method(contextual=contextual)
