"""SparseVLM: what the official vectors do not say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.in_llm.sparsevlm import (
    PRESETS,
    SparseVLM,
    best_and_pool,
    merge_by_density,
    pool_size,
    rater_places,
    word_likeness,
)
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from mmfast.tokens import Keep
from support.attention import DenseAttention
from support.inside import layer_tokens

FIRST = LayerEvent(3, 0, 32)


def prompt(attention: Tensor, before: int = 0, **more: Any) -> LayerTokens:
    """Text, visual tokens, and the words after them with their ``[T, V]`` attention to the visual tokens."""
    words, visual = attention.shape
    length = before + visual + words
    weights = torch.zeros(1, length, length)
    weights[0, before + visual :, before : before + visual] = attention
    states = torch.randn(length, 6, generator=torch.Generator().manual_seed(length))
    given = {"hidden": states, "embeds": states, "attention": DenseAttention.of(weights), "memory": {}, **more}
    return layer_tokens(length, range(before, before + visual), **given)


# ------------------------------------------------------------------------------------ raters


def test_raters_are_the_words_strictly_above_the_mean() -> None:
    visual = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    words = torch.tensor([[1.0, 0.0], [0.0, 9.0], [2.0, 5.0]])
    likeness = word_likeness(visual, words)
    torch.testing.assert_close(likeness, torch.tensor([2.0, 0.0, 4.0]).softmax(dim=0))
    assert rater_places(likeness).tolist() == [2]


def test_a_single_word_rates() -> None:
    """Nothing is above the mean of one, and the official code would divide by zero."""
    tokens = prompt(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    assert SparseVLM().raters(tokens).tolist() == [4]
    found = SparseVLM(recycle=False).choose(tokens, 2, FIRST)
    assert isinstance(found, Tensor)


def test_text_before_the_image_rates_where_none_follows() -> None:
    tokens = prompt(torch.zeros(0, 4), before=2)
    assert set(SparseVLM().raters(tokens).tolist()) <= {0, 1}
    alone = prompt(torch.zeros(0, 4))
    assert SparseVLM().raters(alone).tolist() == [3]


def test_raters_are_remembered_when_tokens_before_them_go() -> None:
    """Also where a token that is no candidate, such as the end of a row, comes to stand behind the last candidate."""
    states = torch.zeros(7, 2)
    states[:4, 0] = 1.0
    states[5, 0] = 3.0
    # Four visual tokens, the third and fourth with the end of a row (2) between them, and two words.
    first = layer_tokens(7, [0, 1, 3], hidden=states, embeds=states, places=torch.arange(7), memory={})
    assert SparseVLM().raters(first).tolist() == [5]
    left = torch.tensor([0, 2, 4, 5, 6])
    later = replace(
        layer_tokens(5, [0], hidden=states[left], places=left, memory=first.memory), total=3, media_totals=(3,)
    )
    assert later.question.tolist() == [1, 2, 3, 4]
    assert SparseVLM().raters(later).tolist() == [3]


def test_the_score_is_the_mean_over_raters_and_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    view = AttentionView(torch.randn(4, 9, 8, generator=generator), torch.randn(2, 9, 8, generator=generator))
    states = torch.randn(9, 6, generator=generator)
    tokens = layer_tokens(9, range(1, 6), hidden=states, embeds=states, attention=view, memory={})
    raters = SparseVLM().raters(tokens)
    assert 1 <= raters.numel() < 3
    wanted = view.rows(raters).mean(dim=(0, 1))[1:6]
    torch.testing.assert_close(SparseVLM().rate(tokens), wanted)


# -------------------------------------------------------------------------------- clustering


def test_far_flung_states_are_clustered_too() -> None:
    """Densities of states this far apart are 0 in single precision, all alike."""
    groups = torch.tensor([[0.0, 0.0], [900.0, 0.0], [0.0, 900.0]])
    shifts = torch.tensor([[0.0, 0.0], [100.0, 0.0], [-100.0, 30.0], [0.0, -90.0]])
    states = (groups[:, None] + shifts).flatten(0, 1)
    merged, centres = merge_by_density(states, 3)
    assert sorted((centres // 4).tolist()) == [0, 1, 2]
    torch.testing.assert_close(merged[(centres // 4).argsort()], groups + shifts.mean(dim=0))


def test_small_distances_beside_a_large_common_part_are_seen() -> None:
    common = torch.full((1, 64), 3000.0)
    groups = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    noise = 0.01 * torch.randn(60, 64, generator=torch.Generator().manual_seed(2))
    states = common + groups.repeat_interleave(30, dim=0) + noise
    merged, centres = merge_by_density(states, 2)
    order = centres.argsort()
    torch.testing.assert_close(merged[order] - common, groups, atol=0.02, rtol=0.0)


def test_duplicates_are_told_apart_by_their_index() -> None:
    states = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 5.0]] * 2)
    merged, centres = merge_by_density(states, 2)
    assert centres.tolist() == [0, 3]
    torch.testing.assert_close(merged, torch.tensor([[1.0, 0.0], [0.0, 5.0]]))


@pytest.mark.parametrize("clusters", [1, 4])
def test_as_many_clusters_as_tokens_or_one(clusters: int) -> None:
    states = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    merged, centres = merge_by_density(states, clusters)
    wanted = states.mean(dim=0, keepdim=True) if clusters == 1 else states[centres]
    torch.testing.assert_close(merged, wanted)


# ------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("name", PRESETS)
def test_presets_leave_what_is_published(name: int) -> None:
    """Kept tokens of the schedule, and clusters of a third of the deleted ones, ten in each."""
    left, alive = [], 576
    for kept in PRESETS[name]:
        alive = kept + (int(0.3 * (alive - kept)) + 1) // 10 + 1
        left.append(alive)
    assert SparseVLM(schedule=PRESETS[name]).counts(576, 32) == left


def test_other_numbers_of_tokens_scale_the_schedule() -> None:
    method = SparseVLM(recycle=False)
    assert method.counts(2880, 32) == [1500, 1000, 550]
    assert method.counts(144, 32) == [75, 50, 28]
    assert [SparseVLM().counts(total, 32) for total in (1, 2)] == [[1, 1, 1], [2, 2, 2]]


@given(alive=st.integers(2, 700), share=st.floats(0.0, 1.0))
def test_what_is_left_is_divided_among_kept_tokens_and_clusters(alive: int, share: float) -> None:
    left = max(1, min(alive - 1, round(share * alive)))
    kept, clusters = SparseVLM().split(alive, left)
    assert kept + clusters == left
    assert kept >= clusters
    assert clusters <= pool_size(alive - kept) <= alive - kept
    # As published wherever that leaves more kept tokens than clusters.
    assert clusters == SparseVLM().clusters(alive - kept) or clusters == left // 2


@settings(deadline=None, max_examples=40)
@given(
    visual=st.integers(2, 40),
    words=st.integers(1, 3),
    keep=st.one_of(st.none(), st.integers(1, 40), st.floats(0.1, 1.0)),
    positions=st.sampled_from(["keep", "compact"]),
)
def test_exactly_the_count_is_left(visual: int, words: int, keep: Any, positions: Any) -> None:
    generator = torch.Generator().manual_seed(visual)
    tokens = prompt(torch.rand(words, visual, generator=generator), before=1)
    method = SparseVLM(keep=keep, positions=positions)
    (count, *_) = method.counts(visual, 32) or [0]
    decision = method(tokens, FIRST)
    if decision is None:
        assert count == visual
        return
    assert len(decision) == count
    if decision.features is not None:
        assert decision.features.dtype == tokens.hidden.dtype


# ---------------------------------------------------------------------------------- decisions


def recycling(positions: Any) -> tuple[LayerTokens, Keep, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = prompt(torch.rand(2, 40, generator=generator), before=3)
    method = SparseVLM(keep=0.4, positions=positions)
    decision = method.choose(tokens, 20, FIRST)
    assert isinstance(decision, Keep)
    assert method.split(40, 20) == (19, 1)
    return tokens, decision, method.rate(tokens)


def test_a_merged_token_stands_at_the_centre_of_its_cluster() -> None:
    tokens, decision, score = recycling("keep")
    best, pool = best_and_pool(score, 19)
    assert decision.features is not None
    written = ~decision.features[:, 0].isnan()
    assert decision.indices[~written].equal(best)
    assert bool(torch.isin(decision.indices[written], pool).all())
    merged = tokens.hidden[tokens.candidates[pool]].mean(dim=0)
    torch.testing.assert_close(decision.features[written][0], merged)


def test_with_compact_positions_merged_tokens_come_last() -> None:
    tokens, decision, score = recycling("compact")
    best, pool = best_and_pool(score, 19)
    assert decision.features is not None
    assert decision.features[:-1].equal(tokens.hidden[tokens.candidates[best]])
    merged = tokens.hidden[tokens.candidates[pool]].mean(dim=0)
    torch.testing.assert_close(decision.features[-1], merged)


def test_half_precision_stays_finite() -> None:
    tokens = prompt(torch.rand(2, 40, generator=torch.Generator().manual_seed(5)))
    half = replace(tokens, hidden=(200 * tokens.hidden).half(), embeds=(200 * tokens.hidden).half())
    decision = SparseVLM()(half, FIRST)
    assert decision is not None
    assert decision.features is not None
    assert decision.features.dtype == torch.float16
    written = ~decision.features[:, 0].isnan()
    assert bool(decision.features[written].isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": (300, 200)}, "same number of steps"),
        ({"schedule": (200, 300, 100)}, "must fall"),
        ({"schedule": (600, 300, 100)}, "must fall"),
        ({"keep": 0}, "keep=0 must be at least 1"),
        ({"layers": (9, 3, 12)}, "must ascend"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseVLM(**options).events(32)
