"""FEATHER: what the official vectors do not say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.in_llm.feather import Feather, grid_first, on_grid, unrotated_score
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from mmfast.tokens import Layout
from support.inside import layer_tokens

FIRST, SECOND = LayerEvent(8, 0, 32), LayerEvent(16, 1, 32)


def prompt(visual: int, **more: Any) -> LayerTokens:
    generator = torch.Generator().manual_seed(visual)
    view = AttentionView(
        torch.randn(4, visual + 3, 6, generator=generator), torch.randn(2, visual + 3, 6, generator=generator)
    )
    return layer_tokens(visual + 3, range(1, visual + 1), attention=view, **more)


def test_the_softmax_runs_over_the_visual_tokens_alone() -> None:
    tokens = prompt(5)
    view = tokens.view()
    rows = torch.einsum("hd,hkd->hk", view.query[:, -1], view.key.repeat_interleave(2, dim=0))[:, 1:6] / 6**0.5
    torch.testing.assert_close(unrotated_score(view, 7, tokens.candidates), rows.softmax(dim=-1).mean(dim=0))


@pytest.mark.parametrize(("height", "width", "stride"), [(4, 6, 3), (5, 2, 2), (1, 7, 3), (3, 3, 9)])
def test_the_grid_is_that_of_the_image(height: int, width: int, stride: int) -> None:
    tokens = prompt(height * width, layouts=(Layout.grid(height, width),))
    wanted = [row % stride == 0 and col % stride == 0 for row in range(height) for col in range(width)]
    assert on_grid(tokens, stride).tolist() == wanted


def test_without_a_layout_a_square_is_assumed_and_else_every_few_tokens_count() -> None:
    assert on_grid(prompt(16), 3).nonzero().squeeze(-1).tolist() == [0, 3, 12, 15]
    assert on_grid(prompt(16, layouts=(Layout.unknown(16),)), 3).equal(on_grid(prompt(16), 3))
    assert on_grid(prompt(15), 3).nonzero().squeeze(-1).tolist() == [0, 3, 6, 9, 12]


def test_every_image_has_a_grid_of_its_own_and_dropped_tokens_do_not_shift_it() -> None:
    layouts = (Layout.grid(2, 3), Layout.grid(3, 3))
    tokens = prompt(15, media_totals=(6, 9), layouts=layouts)
    assert on_grid(tokens, 2).nonzero().squeeze(-1).tolist() == [0, 2, 6, 8, 12, 14]
    left = torch.tensor([1, 2, 5, 8, 9, 14])
    fewer = replace(tokens, candidates=torch.arange(6), origin=left, media=tokens.media[left])
    assert on_grid(fewer, 2).tolist() == [False, True, False, True, False, True]


def test_the_grid_comes_first_and_among_it_the_score_decides() -> None:
    score = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2])
    grid = torch.tensor([True, False, True, False, True])
    assert [grid_first(score, grid, kept).tolist() for kept in (1, 2, 4)] == [[2], [2, 4], [0, 1, 2, 4]]
    # Scores this close together would be equal if one were added to them.
    close = torch.tensor([1.0e-9, 2.0e-9])
    assert grid_first(close, torch.tensor([True, True]), 1).tolist() == [1]


def test_the_second_step_knows_no_grid() -> None:
    tokens = prompt(16, layouts=(Layout.grid(4, 4),))
    score = unrotated_score(tokens.view(), tokens.last_token, tokens.candidates)
    method = Feather()
    assert method.choose(tokens, 3, SECOND).tolist() == score.topk(3).indices.sort().values.tolist()
    assert method.choose(tokens, 6, FIRST).tolist() == grid_first(score, on_grid(tokens, 3), 6).tolist()


def test_without_keep_the_best_and_the_grid_are_united() -> None:
    tokens = prompt(36, layouts=(Layout.grid(6, 6),))
    score = unrotated_score(tokens.view(), tokens.last_token, tokens.candidates)
    method = Feather(keep=None, drop=0.75)
    best = set(score.topk(9).indices.tolist())
    assert set(method.choose(tokens, None, FIRST).tolist()) == best | {0, 3, 18, 21}
    assert method.choose(tokens, None, SECOND).tolist() == score.topk(2).indices.sort().values.tolist()
    assert method.counts(36, 32) is None


@settings(deadline=None, max_examples=40)
@given(
    visual=st.integers(2, 50),
    keep=st.one_of(st.integers(1, 50), st.floats(0.3, 1.0)),
    stride=st.integers(1, 5),
    depth=st.sampled_from([4, 5, 28, 32]),
)
def test_exactly_the_count_is_left(visual: int, keep: float, stride: int, depth: int) -> None:
    method, tokens = Feather(keep=keep, stride=stride), prompt(visual)
    for event in method.events(depth):
        wanted = (method.counts(visual, depth) or [])[event.step]
        decision = method(tokens, event)
        assert (visual if decision is None else len(decision)) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stride": 0}, "stride=0 must be at least 1"), ({"drop": 1.0}, r"drop=1.0 must lie in \[0, 1\)")],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Feather(**options)
