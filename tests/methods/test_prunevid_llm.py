"""PruneVid inside the language model: frames share the budget, and the strongest look counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.layers import LayerTokens
from mmfast.tokens import Layout
from support.attention import DenseAttention


def prompt(weights: Tensor, layouts: tuple[Layout, ...], sizes: tuple[int, ...]) -> LayerTokens:
    total = sum(sizes)
    return LayerTokens(
        hidden=torch.zeros(weights.shape[1], 2),
        candidates=torch.arange(total),
        origin=torch.arange(total),
        media=torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
        total=total,
        media_totals=sizes,
        layouts=layouts,
        attention=DenseAttention.of(weights),
    )


def test_each_frame_keeps_its_share_of_what_any_word_looks_at() -> None:
    weights = torch.full((2, 8, 8), 0.01)
    weights[0, 6, 1] = 0.9  # one head of one word
    weights[1, 7, 0] = 0.3
    weights[:, 6:, 3] = 0.05
    tokens = prompt(weights, (Layout.grid(1, 3, frames=2),), (6,))
    method = get("prunevid_llm").method(keep=2)
    assert method(tokens, method.events(32)[0]).indices.tolist() == [1, 3]


def test_images_are_frames_of_their_own_where_nothing_is_known() -> None:
    weights = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0))
    method = get("prunevid_llm").method(keep=2)
    kept = method(prompt(weights, (), (4, 4)), method.events(32)[0]).indices
    assert (kept < 4).sum() == 2
    assert len(kept) == 4


def test_the_default_layer_is_the_published_one() -> None:
    method = get("prunevid_llm").method()
    assert method.events(32)[0].layer == 11
    assert method.request(method.events(32)[0]).layer == 10
    assert method.truncations(32) == [(11, 0, 11)]
    assert get("prunevid_llm").method(truncate_cache=False).truncations(32) == []


def test_official_shares_need_a_fraction() -> None:
    with pytest.raises(ValueError, match="give keep=3 as a fraction"):
        get("prunevid_llm").method(keep=3, compat="official")
    assert get("prunevid_llm").method(compat="official").counts(100, 32) is None
