"""PruMerge and PruMerge+: what the official vectors do not say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.registry import get
from mmfast.token_pruning import similarity
from mmfast.token_pruning.before_llm.prumerge import add_neighbours
from mmfast.token_pruning.similarity import outlier_share
from mmfast.tokens import Layout, VisualTokens

BOTH = pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])


def random_tokens(total: int, seed: int = 0, *, attention: torch.Tensor | None = None) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(total, generator=generator).mul(3).softmax(dim=0)
    signals = {
        "cls_attention": drawn if attention is None else attention,
        "keys": torch.randn(total, 4, generator=generator),
        "patch_features": torch.randn(total, 6, generator=generator),
    }
    features = torch.randn(total, 3, generator=generator)
    return VisualTokens(features, Layout.unknown(total), signals=signals, projectable=True)


@BOTH
@settings(deadline=None)
@given(total=st.integers(2, 90), kept=st.integers(1, 89), compat=st.sampled_from([None, "official"]))
def test_exactly_keep_survive(name: str, total: int, kept: int, compat: str | None) -> None:
    """Also with fewer tokens than the paper's 32 neighbours, and with one token."""
    decision = get(name).method(keep=kept, compat=compat)(random_tokens(total))
    if kept >= total:
        assert decision is None
        return
    assert len(decision) == kept
    assert decision.source.ge(0).all() == (kept > 1)
    joined = decision.source[decision.source >= 0]
    assert torch.bincount(joined, minlength=kept).float().equal(decision.sizes)


@BOTH
def test_the_count_is_that_of_the_image(name: str) -> None:
    """Two outliers of 40; PruMerge+ adds every sixth token (a third of 1 / 0.05); and the sum of the others."""
    attention = torch.linspace(0.01, 0.02, 40)
    attention[[6, 25]] = torch.tensor([0.5, 0.9])
    method = get(name).method()
    tokens = random_tokens(40, attention=attention)
    slots = [6, 25] if name == "prumerge" else [0, 6, 12, 18, 24, 25, 30, 36]
    # The sum of the dropped tokens stands where the one of highest attention was.
    assert method(tokens).indices.tolist() == [*slots, 39]
    assert method.own_count(tokens) == len(slots) + 1


@BOTH
@pytest.mark.parametrize("level", [0.0, 0.01])
def test_flat_attention_keeps_something(name: str, level: float) -> None:
    decision = get(name).method()(random_tokens(50, attention=torch.full((50,), level)))
    assert decision.indices[0] == 0
    assert bool(decision.features.isfinite().all())
    # One token by attention and the sum, and for PruMerge+ tokens 0, 16, 32 and 48.
    assert decision.indices.tolist() == ([0, 1] if name == "prumerge" else [0, 1, 16, 32, 48])


def test_the_last_token_is_sampled_unless_official() -> None:
    attention = torch.full((49,), 0.01)
    chosen = {
        compat: get("prumerge_plus").method(compat=compat).outliers(attention).tolist() for compat in (None, "official")
    }
    assert chosen == {None: [0, 16, 32, 48], "official": [0, 16, 32]}


def test_official_order_is_by_attention_with_the_sum_last() -> None:
    tokens = random_tokens(30)
    official = get("prumerge").method(keep=6, compat="official")(tokens)
    default = get("prumerge").method(keep=6)(tokens)
    assert official.indices.equal(default.indices)
    assert official.sizes.tolist() == [1, 1, 1, 1, 1, 25]
    order = tokens.signals["cls_attention"].argsort(descending=True)[:6]
    places = torch.searchsorted(default.indices, order)
    assert torch.equal(default.features[places], official.features)


def test_neighbours_match_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(60, seed=3)
    attention, features = tokens.signals["cls_attention"], tokens.signals["patch_features"]
    keys = torch.nn.functional.normalize(tokens.signals["keys"], dim=-1)
    picks = torch.tensor([40, 3, 17])
    expected = []
    for pick in picks.tolist():
        others = [i for i in range(60) if i != pick]
        near = sorted(others, key=lambda i: -float(keys[i] @ keys[pick]))[:32]
        expected.append(features[pick] + sum(attention[i] * features[i] for i in near))
    whole = add_neighbours(features, tokens.signals["keys"], attention, picks)
    assert torch.allclose(whole, torch.stack(expected), atol=1e-5)
    monkeypatch.setattr(similarity, "_BLOCK_ELEMENTS", 60)
    monkeypatch.setattr(similarity, "MATRIX_LIMIT", 0)
    blocked = add_neighbours(features, tokens.signals["keys"], attention, picks)
    assert torch.allclose(blocked, whole, atol=1e-6)


@given(values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60))
def test_outliers_are_those_of_numpy(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    low, high = np.percentile(array, [25, 75])
    assert outlier_share(torch.from_numpy(array)) == (array > high + 1.5 * (high - low)).mean()


@BOTH
def test_bad_options_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="neighbours=-1 must be a count"):
        get(name).method(neighbours=-1)
    with pytest.raises(ValueError, match="keep=None counts the outliers of the whole image"):
        get(name).method(scope="per_tile")
    with pytest.raises(ValueError, match="compat='paper' must be one of"):
        get(name).method(compat="paper")
