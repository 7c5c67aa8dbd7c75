"""SparseVLM+: what the official vectors do not say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.in_llm.sparsevlm_plus import PRESETS, SparseVLMPlus, rotary_trend
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from support.inside import layer_tokens

FIRST = LayerEvent(3, 0, 32)


def prompt(heads: int = 4) -> LayerTokens:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(12, 6, generator=generator)
    view = AttentionView(torch.randn(heads, 12, 8, generator=generator), torch.randn(1, 12, 8, generator=generator))
    return layer_tokens(12, range(2, 9), hidden=states, embeds=states, attention=view, memory={})


def corrected(tokens: LayerTokens, places: Tensor, base: float) -> Tensor:
    """Divide each entry of the raters' rows by the product of two vectors of ones, rotated to their places."""
    raters = SparseVLMPlus().raters(replace(tokens, memory={}))
    width = tokens.view().query.shape[-1]
    frequencies = torch.tensor([base ** (-2 * pair / width) for pair in range(width // 2)])
    angles = places[:, None].float() * frequencies
    # A pair of ones turned by an angle.
    ones = torch.cat([angles.cos() - angles.sin(), angles.cos() + angles.sin()], dim=-1)
    trend = ones @ ones.T / math.sqrt(width)
    return tokens.view().rows(raters)[:, :, tokens.candidates] / trend[raters][:, tokens.candidates]


def test_the_trend_is_that_of_rotated_ones() -> None:
    distance = torch.arange(-3, 500)
    angles = torch.tensor([[place * 500.0 ** (-2 * pair / 12) for pair in range(6)] for place in distance.tolist()])
    torch.testing.assert_close(
        rotary_trend(distance, 12, 500.0), 2 * angles.cos().sum(dim=-1) / math.sqrt(12), rtol=1e-4, atol=1e-4
    )


def test_no_attention_divided_by_no_trend_is_a_number() -> None:
    # Two frequencies whose cosines cancel each other at distance 1.
    trend = rotary_trend(torch.tensor([1]), 4, (math.pi - 1.0) ** -2)
    assert trend.abs().item() == pytest.approx(1e-6)


@pytest.mark.parametrize("rating_heads", [0, 1, 3, 9])
def test_the_heads_that_look_most_rate(rating_heads: int) -> None:
    tokens = prompt()
    entries = corrected(tokens, torch.arange(12), 10000.0)
    wanted = min(rating_heads or 2, 4)
    heads = entries.sum(dim=(1, 2)).topk(wanted).indices
    found = SparseVLMPlus(rating_heads=rating_heads).rate(tokens)
    torch.testing.assert_close(found, entries[heads].mean(dim=(0, 1)), rtol=1e-4, atol=1e-5)


def test_a_single_head_rates_alone() -> None:
    tokens = prompt(heads=1)
    entries = corrected(tokens, torch.arange(12), 10000.0)
    torch.testing.assert_close(SparseVLMPlus().rate(tokens), entries[0].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_distances_are_those_of_the_full_prompt() -> None:
    places = torch.tensor([0, 1, 2, 5, 6, 9, 11, 12, 20, 21, 22, 23])
    tokens = replace(prompt(), places=places)
    entries = corrected(tokens, places, 500.0)
    heads = entries.sum(dim=(1, 2)).topk(2).indices
    found = SparseVLMPlus(rope_base=500.0).rate(tokens)
    torch.testing.assert_close(found, entries[heads].mean(dim=(0, 1)), rtol=1e-4, atol=1e-5)


def test_nothing_is_merged() -> None:
    tokens = prompt()
    decision = SparseVLMPlus(keep=0.5)(tokens, FIRST)
    assert decision is not None
    assert decision.features is None
    assert len(decision) == (SparseVLMPlus(keep=0.5).counts(7, 32) or [])[0]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_leave_what_is_published(name: int) -> None:
    assert SparseVLMPlus(schedule=PRESETS[name]).counts(576, 32) == list(PRESETS[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_base": 1.0}, "rope_base=1.0 must be above 1"),
        ({"rating_heads": -1}, "rating_heads=-1 must be"),
        ({"recycle": True}, "belongs to 'sparsevlm'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseVLMPlus(**options)
