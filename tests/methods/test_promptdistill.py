"""PromptDistill: what the official vectors do not say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.in_llm.promptdistill import PromptDistill, smoothed
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from support.inside import layer_tokens

EVENT = LayerEvent(14, 0, 32)


def prompt() -> LayerTokens:
    generator = torch.Generator().manual_seed(4)
    view = AttentionView(torch.randn(4, 14, 6, generator=generator), torch.randn(2, 14, 6, generator=generator))
    return layer_tokens(14, range(2, 12), attention=view)


@pytest.mark.parametrize("pooling", [False, True])
def test_scores_are_raw_logits_averaged_over_heads_and_neighbours(pooling: bool) -> None:
    tokens = prompt()
    view = tokens.view()
    raw = torch.einsum("hd,hkd->hk", view.query[:, -1], view.key.repeat_interleave(2, dim=0)).mean(dim=0) / 6**0.5
    padded = [0.0, 0.0, *raw.tolist()[:-1], 0.0, 0.0, 0.0]
    wanted = [sum(padded[i : i + 5]) / 5 for i in range(14)] if pooling else [*raw.tolist()[:-1], 0.0]
    found = PromptDistill(pooling=pooling).score(tokens, EVENT)
    torch.testing.assert_close(found, torch.tensor(wanted)[2:12])


def test_zeros_beyond_the_end_compete_with_negative_logits() -> None:
    logits = torch.full((8,), -1.0)
    found = smoothed(logits, 7, pooling=True)
    torch.testing.assert_close(found, torch.tensor([-0.6, -0.8, -1.0, -1.0, -1.0, -0.8, -0.6, -0.4]))
    assert smoothed(logits, 7, pooling=False).tolist() == [-1.0] * 7 + [0.0]
    assert logits.tolist() == [-1.0] * 8


def test_what_is_cached_takes_no_part() -> None:
    tokens = prompt()
    view = tokens.view()
    longer = replace(view, key=torch.cat([torch.full((2, 3, 6), 9.0), view.key], dim=1))
    found = PromptDistill().score(replace(tokens, attention=longer), EVENT)
    torch.testing.assert_close(found, PromptDistill().score(tokens, EVENT))


def test_text_is_no_candidate() -> None:
    decision = PromptDistill(keep=0.7)(prompt(), EVENT)
    assert decision is not None
    assert len(decision) == (PromptDistill(keep=0.7).counts(10, 32) or [])[0]
    assert 0 <= int(decision.indices.min()) <= int(decision.indices.max()) < 10


def test_the_default_drops_after_layer_13_of_32() -> None:
    method = PromptDistill()
    assert [event.layer for event in method.events(32)] == [14]
    assert method.keep_counts(576, 10, 32) == [586] * 14 + [154] * 18


@pytest.mark.parametrize(
    ("steps", "cuts"),
    [(0, []), (1, [(8, 0, 8)]), (2, [(8, 0, 8), (16, 0, 16)]), (5, [(8, 0, 8), (16, 0, 16)]), (-1, None)],
)
def test_caches_before_the_first_steps_are_cut(steps: int, cuts: list[tuple[int, int, int]] | None) -> None:
    method = PromptDistill(layers=(8, 16), fractions=(0.5, 0.25), truncated_steps=steps)
    assert method.truncations(32) == ([(8, 0, 8), (16, 0, 16)] if cuts is None else cuts)


def test_a_step_at_or_beyond_the_last_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must lie in 1\.\.31"):
        PromptDistill(layers=(32,)).events(32)
    with pytest.raises(ValueError, match="truncated_steps=-2"):
        PromptDistill(truncated_steps=-2)
