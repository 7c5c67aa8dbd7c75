"""DART: what the official vectors do not say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.in_llm.dart import DART, key_sizes, largest, least_alike, processing_order
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from support.inside import layer_tokens

EVENT = LayerEvent(2, 0, 4)


def prompt(visual: int, words: int, before: int = 1, *, heads: int = 2, **more: Any) -> LayerTokens:
    generator = torch.Generator().manual_seed(visual)
    length = before + visual + words
    states = torch.randn(length, 5, generator=generator)
    view = AttentionView(torch.zeros(4, length, 6), torch.randn(heads, length, 6, generator=generator))
    return layer_tokens(length, range(before, before + visual), hidden=states, normed=states, attention=view, **more)


def naive(tokens: LayerTokens, pivots: tuple[int, int], kept: int) -> list[int]:
    """Pivots take turns by themselves: one candidate at a time, in plain loops."""
    key = tokens.view().key
    size = [float(key[:, place].abs().sum()) for place in range(key.shape[1])]
    visual = sorted(tokens.candidates.tolist(), key=lambda place: -size[place])
    after = list(range(max(visual) + 1, len(size)))
    own = visual[: pivots[0] if after else sum(pivots)][:kept]
    chosen = list(own)
    every = own + sorted(after, key=lambda place: -size[place])[: pivots[1]]
    for number, pivot in enumerate(every):
        share = sum(1 for turn in range(kept - len(own)) if turn % len(every) == number)
        free = [place for place in tokens.candidates.tolist() if place not in chosen]
        alike = torch.cosine_similarity(tokens.normed[pivot], tokens.normed[free], dim=-1)
        chosen += [free[i] for i in alike.argsort(stable=True)[:share]]
    return sorted(place - int(tokens.candidates[0]) for place in chosen)


@settings(deadline=None, max_examples=60)
@given(
    visual=st.integers(2, 30),
    words=st.integers(0, 6),
    pivots=st.tuples(st.integers(1, 5), st.integers(0, 5)),
    share=st.floats(0.0, 1.0),
)
def test_pivots_share_the_budget(visual: int, words: int, pivots: tuple[int, int], share: float) -> None:
    """Also where there is less text than pivots, none at all, or less budget than pivots."""
    tokens, kept = prompt(visual, words), max(1, min(visual - 1, round(share * visual)))
    found = DART(visual_pivots=pivots[0], text_pivots=pivots[1]).choose(tokens, kept, EVENT)
    assert found.tolist() == naive(tokens, pivots, kept)


def test_keys_of_grouped_heads_rank_alike() -> None:
    key = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    repeated = key_sizes(key.repeat_interleave(3, dim=0))
    torch.testing.assert_close(repeated, 3 * key_sizes(key))


def test_cached_tokens_are_no_pivots() -> None:
    tokens = prompt(8, 3)
    past = torch.full((2, 5, 6), 50.0)
    view = tokens.view()
    after_others = replace(tokens, attention=replace(view, key=torch.cat([past, view.key], dim=1)))
    assert after_others.view().past == 5
    assert DART().choose(after_others, 6, EVENT).equal(DART().choose(tokens, 6, EVENT))


def test_equal_tokens_go_to_the_lower_index() -> None:
    states = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert largest(torch.ones(4), torch.arange(4), 2).tolist() == [0, 1]
    assert least_alike(states, torch.arange(4), torch.tensor([0]), [0], 2).tolist() == [1, 2]


def test_the_pool_does_not_run_dry() -> None:
    states = torch.eye(4)
    assert least_alike(states, torch.arange(4), torch.tensor([0, 1]), [0, 1], 9).sort().values.tolist() == [2, 3]
    assert least_alike(states, torch.arange(2), torch.tensor([0, 1]), [0, 1], 1).tolist() == []


def test_official_order_is_that_of_a_set() -> None:
    visual, text = [62, 72, 68, 63], [100, 96, 104, 92]
    assert processing_order(visual, text, "size") == [*visual, *text]
    # What CPython makes of these eight, in a table of 32 places.
    assert processing_order(visual, text, "official") == [96, 100, 68, 72, 104, 92, 62, 63]


@pytest.mark.parametrize(
    ("keep", "total", "left"),
    [(128, 576, 132), (192, 576, 196), (1 - 0.778, 576, 124), (1 - 0.667, 576, 188), (7, 576, 4), (128, 40, 40)],
)
def test_official_arithmetic_cuts_off_and_adds_pivots(keep: float, total: int, left: int) -> None:
    assert DART(keep=keep, compat="official").counts(total, 32) == [left]
    assert DART(keep=keep).counts(total, 32) == [min(total, keep if isinstance(keep, int) else round(keep * total))]


def test_official_arithmetic_is_kept() -> None:
    tokens = prompt(40, 9)
    decision = DART(keep=17, compat="official")(tokens, EVENT)
    assert decision is not None
    assert len(decision) == 20


def test_a_count_is_one_per_image() -> None:
    tokens = prompt(20, 4, media_totals=(8, 12))
    both = DART(keep=5)(tokens, EVENT)
    assert both is not None
    assert len(both) == 10
    each = DART(keep=5, scope="per_image")(tokens, EVENT)
    assert each is not None
    assert torch.bincount(tokens.media[each.indices]).tolist() == [5, 5]
    assert DART(keep=5, compat="official").counts(20, 4, images=2) == [12]


def test_zero_states_are_like_nothing() -> None:
    tokens = replace(prompt(8, 2), normed=torch.zeros(11, 5))
    found = DART(keep=5)(tokens, EVENT)
    assert found is not None
    assert len(found) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "random"}, "order='random' must be one of"),
        ({"compat": "paper"}, "compat='paper' must be one of"),
        ({"visual_pivots": 0}, "visual_pivots=0 must be at least 1"),
        ({"text_pivots": -1}, "text_pivots=-1 at least 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DART(**options)


def test_the_final_norm_is_needed() -> None:
    with pytest.raises(ValueError, match="final_norm"):
        DART(keep=2)(replace(prompt(8, 2), normed=None), EVENT)
