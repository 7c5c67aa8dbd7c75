"""Anchor merging: a hand-made case and what must hold whatever the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.plan import Plan
from mmfast.registry import get
from mmfast.token_pruning import similarity
from mmfast.token_pruning.before_llm.anchor_merge import anchor_scores, median_slots, top_anchors
from mmfast.token_pruning.before_llm.divprune import max_min_order
from mmfast.tokens import Layout, VisualTokens


def random_tokens(height: int, width: int, seed: int = 0, frames: int = 1) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    total = frames * height * width
    signals = {
        "cls_attention": torch.rand(total, generator=generator),
        "patch_features": torch.randn(total, 7, generator=generator),
    }
    layout = Layout.grid(height, width, frames=frames)
    return VisualTokens(torch.randn(total, 5, generator=generator), layout, signals=signals)


def test_hand_made_case() -> None:
    """Three directions: one token along z stays alone, four along x and three along y are merged."""
    x, y, z = torch.eye(3)
    features = torch.stack([x, 2 * x, y, y, 3 * x, z, 4 * y, x])
    method = get("anchor_merge").method(keep=3, share=0.34, calibrate=False)
    assert max_min_order(features, 1).tolist() == [5]
    decision = method(VisualTokens.from_features(features))
    # The members of x are 0, 1, 4, 7 with the lower median 1; those of y are 2, 3, 6 with the median 3.
    assert decision.indices.tolist() == [1, 3, 5]
    assert decision.sizes.tolist() == [4.0, 3.0, 1.0]
    assert decision.source.tolist() == [0, 0, 1, 1, 0, 2, 1, 0]
    assert torch.allclose(decision.features, torch.stack([7 / 4 * x, 2 * y, z]))


def test_the_pruner_keeps_its_share_untouched() -> None:
    tokens = random_tokens(6, 6)
    decision = get("anchor_merge").method(keep=12, pruner="divprune", share=0.5)(tokens)
    alone = max_min_order(tokens.features, 6)
    places = decision.source[alone]
    assert decision.indices[places].equal(alone)
    assert decision.features[places].equal(tokens.features[alone])
    assert decision.sizes[places].tolist() == [1.0] * 6


@settings(deadline=None)
@given(
    height=st.integers(1, 7),
    width=st.integers(2, 7),
    keep=st.integers(1, 20),
    share=st.sampled_from([0.0, 0.3, 0.5, 0.99]),
    pruner=st.sampled_from(["divprune", "vispruner", "scope", "uniform"]),
    duplicates=st.booleans(),
    seed=st.integers(0, 5),
)
def test_every_token_is_counted_once_and_sums_are_kept(
    height: int, width: int, keep: int, share: float, pruner: str, duplicates: bool, seed: int
) -> None:
    tokens = random_tokens(height, width, seed)
    if duplicates:
        tokens.features[:] = tokens.features[:1]
    decision = get("anchor_merge").method(keep=keep, share=share, pruner=pruner)(tokens)
    if keep >= len(tokens):
        assert decision is None
        return
    assert len(decision) == keep
    assert int(decision.source.min()) >= 0
    assert torch.bincount(decision.source, minlength=keep).float().equal(decision.sizes)
    weighted = (decision.sizes[:, None] * decision.features).sum(dim=0)
    assert torch.allclose(weighted, tokens.features.sum(dim=0), atol=1e-4)


def test_a_merged_token_stands_at_the_median_of_its_members() -> None:
    assert median_slots(torch.tensor([1, 1, 0, 1, 1, 1]), 2).tolist() == [2, 3]
    assert median_slots(torch.tensor([1, 2, 2, 0, 1, 1, 2, 2]), 3).tolist() == [3, 4, 2]


def test_of_equal_tokens_one_is_an_anchor() -> None:
    x, y = torch.eye(2)
    assert top_anchors(torch.stack([x, x, x, y, y]), torch.ones(5, dtype=torch.bool), 2).tolist() == [0, 3]


def test_scores_match_the_formula() -> None:
    features = random_tokens(5, 5).features
    unit = torch.nn.functional.normalize(features, dim=-1)
    cosine = unit @ unit.T
    density = cosine.sum(dim=1)
    expected = []
    for own in range(25):
        denser = [float(cosine[own, other]) for other in range(25) if density[other] > density[own]]
        expected.append(float(density[own]) * (1 - (max(denser) if denser else float(cosine[own].min()))))
    assert torch.allclose(anchor_scores(features), torch.tensor(expected), atol=1e-5)


def test_blocks_do_not_change_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    features = random_tokens(9, 9).features
    whole = anchor_scores(features)
    monkeypatch.setattr(similarity, "_BLOCK_ELEMENTS", 200)
    assert torch.allclose(anchor_scores(features), whole, atol=1e-6)


def test_the_pruner_says_what_is_read() -> None:
    method = get("anchor_merge").method(pruner="scope", pruner_options=(("alpha", 2.0),))
    scope = get("scope").method(alpha=2.0)
    assert method.needs == scope.needs
    assert method.vision_signals() == scope.vision_signals()
    assert method.positions == "keep"
    assert get("anchor_merge").method().needs == frozenset()


def test_options_reach_the_pruner() -> None:
    tokens = random_tokens(5, 5)
    picks = []
    for seed in (0, 1):
        options = (("seed", seed),)
        decision = get("anchor_merge").method(keep=8, pruner="random", pruner_options=options)(tokens)
        expected = get("random").method(keep=4, seed=seed)(tokens).indices
        alone = decision.source[expected]
        assert decision.sizes[alone].tolist() == [1.0] * 4
        picks.append(expected.tolist())
    assert picks[0] != picks[1]


def test_options_survive_text_and_files() -> None:
    method = get("anchor_merge").method(keep=8, pruner="scope", pruner_options=[["alpha", 0.5]])
    assert Plan.parse(method.to_text()).methods == (method,)
    assert Plan.from_dict(Plan((method,)).to_dict()).methods == (method,)
    assert hash(method) == hash(Plan.parse(method.to_text()).methods[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, r"share=1.0 must lie in \[0, 1\)"),
        ({"calibrate": 1}, "calibrate=1 must be None, True or False"),
        ({"pruner": "anchor_merge"}, "must name a method that drops"),
        ({"pruner": "visionzip"}, "must name a method that drops"),
        ({"pruner": "fastv"}, "must name a method that drops"),
        ({"pruner": "divprun"}, "did you mean divprune"),
        ({"pruner_options": (("keep", 3),)}, "'keep' cannot be given"),
        ({"pruner": "scope", "pruner_options": (("alpha", -1),)}, "alpha=-1 must be"),
        ({"pruner_options": "alpha"}, "must be pairs of name and value"),
        ({"pruner_options": (("alpha",),)}, "must be pairs of name and value"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("anchor_merge").method(**options)
