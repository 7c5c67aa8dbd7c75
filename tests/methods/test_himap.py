"""HiMAP: what the official vectors do not say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.in_llm.himap import HiMAP, attention_from
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from support.inside import layer_tokens


def prompt(visual: int, words: int, before: int = 2) -> LayerTokens:
    generator = torch.Generator().manual_seed(visual)
    length = before + visual + words
    view = AttentionView(torch.randn(4, length, 6, generator=generator), torch.randn(2, length, 6, generator=generator))
    return layer_tokens(length, range(before, before + visual), attention=view)


def test_the_question_rates_first_and_the_image_later() -> None:
    tokens = prompt(6, 3)
    whole = tokens.view().rows(torch.arange(11)).mean(dim=0)
    first = HiMAP().score(tokens, LayerEvent(2, 0, 32))
    torch.testing.assert_close(first, whole[8:, 2:8].sum(dim=0))
    later = HiMAP().score(tokens, LayerEvent(8, 1, 32))
    torch.testing.assert_close(later, whole[2:8, 2:8].sum(dim=0))


def test_early_tokens_are_seen_by_more_rows() -> None:
    """The bias of the published second step: with attention spread evenly the first tokens win."""
    even = AttentionView(torch.zeros(1, 9, 4), torch.zeros(1, 9, 4))
    tokens = replace(prompt(6, 1), attention=even)
    kept = HiMAP().choose(tokens, 2, LayerEvent(8, 1, 32))
    assert isinstance(kept, torch.Tensor)
    assert kept.tolist() == [0, 1]


def test_text_before_the_image_rates_where_none_follows() -> None:
    tokens = prompt(6, 0)
    found = HiMAP().score(tokens, LayerEvent(2, 0, 32))
    assert found.equal(attention_from(tokens, torch.tensor([0, 1])))


@pytest.mark.parametrize(("total", "counts"), [(576, [288, 72]), (57, [28, 7]), (1, [1, 1])])
def test_the_published_setting(total: int, counts: list[int]) -> None:
    assert [event.layer for event in HiMAP().events(32)] == [2, 8]
    assert HiMAP().counts(total, 32) == counts


def test_other_depths_keep_the_average() -> None:
    assert [event.layer for event in HiMAP().events(28)] == [2, 7]
    first, second = HiMAP().counts(5760, 28) or []
    assert (2 * 5760 + 5 * first + 21 * second) / (28 * 5760) == pytest.approx(0.25, abs=0.001)


def test_in_a_shallow_model_both_steps_are_one_that_the_question_decides() -> None:
    (event,) = HiMAP().events(5)
    assert (event.layer, event.step) == (1, 0)
