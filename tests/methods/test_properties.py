"""Properties that hold for every method, whatever the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmfast
from mmfast.budget import count
from mmfast.token_pruning.base import LayerTokens, Merger
from mmfast.token_pruning.before_llm.divprune import MATRIX_LIMIT, max_min_order
from mmfast.token_pruning.before_llm.pool2d import pooled_grid
from mmfast.tokens import Keep, Layout, VisualTokens

BEFORE = mmfast.methods("before_llm")
INSIDE = mmfast.methods("in_llm")
sizes = st.integers(1, 9)
keeps = st.one_of(st.integers(1, 90), st.floats(0.01, 1.0))


def grid_tokens(height: int, width: int, seed: int, *, duplicates: bool = False) -> VisualTokens:
    features = torch.randn(height * width, 6, generator=torch.Generator().manual_seed(seed))
    if duplicates:
        features[:] = features[:1]
    return VisualTokens(features, Layout.grid(height, width))


@pytest.mark.parametrize("info", BEFORE, ids=lambda info: info.name)
@given(height=sizes, width=sizes, keep=keeps, seed=st.integers(0, 5), duplicates=st.booleans())
@settings(max_examples=60, deadline=None)
def test_before_llm_decisions_are_sound(
    info: mmfast.MethodInfo, height: int, width: int, keep: float, seed: int, duplicates: bool
) -> None:
    tokens = grid_tokens(height, width, seed, duplicates=duplicates)
    method = info.method(keep=keep)
    decision = method(tokens)
    total = height * width
    promised = count(keep, total)
    if decision is None:
        assert promised == total
        return
    assert decision.indices.unique().equal(decision.indices)
    assert 0 <= int(decision.indices.min()) <= int(decision.indices.max()) < total
    if isinstance(method, Merger):
        assert 1 <= len(decision) <= promised
        assert decision.features is not None
        assert decision.features.shape == (len(decision), 6)
        assert decision.source is not None
        assert int(decision.source.max()) == len(decision) - 1
    else:
        assert len(decision) == promised
    again = method(tokens)
    assert again is not None
    assert again.indices.equal(decision.indices)


@pytest.mark.parametrize("info", BEFORE, ids=lambda info: info.name)
@pytest.mark.parametrize("policy", ["keep_nonempty", "keep", "drop"])
def test_newline_tokens_follow_the_policy(info: mmfast.MethodInfo, policy: str) -> None:
    """A 4 x 3 grid with a newline after each row and one at the end that belongs to no row."""
    rows = torch.arange(4).repeat_interleave(4)
    cols = torch.tensor([0, 1, 2, -1]).repeat(4)
    layout = Layout(
        "image",
        torch.cat([torch.zeros(16, dtype=torch.int64), torch.tensor([-1])]),
        torch.cat([torch.zeros(16, dtype=torch.int64), torch.tensor([-1])]),
        torch.cat([rows, torch.tensor([-1])]),
        torch.cat([cols, torch.tensor([-1])]),
        torch.cat([cols == -1, torch.tensor([True])]),
    )
    tokens = VisualTokens(torch.randn(17, 6, generator=torch.Generator().manual_seed(0)), layout)
    method = info.method(keep=3, newline=policy)
    decision: Keep = method(tokens)
    newline = layout.is_newline[decision.indices]
    patches = decision.indices[~newline]
    assert 1 <= patches.numel() <= 3
    if policy == "drop":
        assert not newline.any()
    elif policy == "keep":
        assert int(newline.sum()) == 5
    else:
        alive = set(layout.row[patches].tolist()) | {-1}
        assert set(layout.row[decision.indices[newline]].tolist()) == alive
    if decision.features is not None:
        assert bool(decision.features[newline].isnan().all())
        assert not decision.features[~newline].isnan().any()


@given(
    total=st.integers(1, 60),
    width=st.integers(1, 5),
    seed=st.integers(0, 9),
    scale=st.sampled_from([0.0, 1e-20, 1.0]),
)
@settings(deadline=None)
def test_max_min_order_never_repeats(total: int, width: int, seed: int, scale: float) -> None:
    features = scale * torch.randn(total, width, generator=torch.Generator().manual_seed(seed))
    order = max_min_order(features, total)
    assert sorted(order.tolist()) == list(range(total))


def test_max_min_order_is_the_same_with_and_without_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(300, 16, generator=torch.Generator().manual_seed(3))
    with_matrix = max_min_order(features, 40)
    monkeypatch.setattr("mmfast.token_pruning.before_llm.divprune.MATRIX_LIMIT", 0)
    assert max_min_order(features, 40).equal(with_matrix)
    assert MATRIX_LIMIT == 4096


def test_max_min_order_matches_a_naive_greedy_search() -> None:
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(features, dim=-1)
    distance = 1 - unit @ unit.T
    distance.fill_diagonal_(torch.inf)
    picks = [int(distance.min(dim=0).values.argmax())]
    while len(picks) < 12:
        rest = [i for i in range(40) if i not in picks]
        picks.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in picks)))
    assert max_min_order(features, 12).tolist() == picks


@given(height=st.integers(1, 40), width=st.integers(1, 40), limit=st.integers(1, 500))
def test_pooled_grids_fit(height: int, width: int, limit: int) -> None:
    new_height, new_width = pooled_grid(height, width, limit)
    assert 1 <= new_height <= height
    assert 1 <= new_width <= width
    assert new_height * new_width <= limit


@pytest.mark.parametrize("info", INSIDE, ids=lambda info: info.name)
@given(
    images=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    text=st.integers(1, 4),
    keep=st.one_of(st.integers(1, 14), st.floats(0.05, 1.0)),
    scope=st.sampled_from(["global", "per_image"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_in_llm_decisions_are_sound(
    info: mmfast.MethodInfo, images: list[int], text: int, keep: float, scope: str, seed: int
) -> None:
    method = info.method(keep=keep, scope=scope)
    generator = torch.Generator().manual_seed(seed)
    total, length = sum(images), sum(images) + text
    rows = torch.rand(2, length, generator=generator)
    alive = torch.arange(total)
    media = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(images))
    for event in method.events(8):
        before = alive
        tokens = LayerTokens(
            torch.randn(length, 4, generator=generator),
            candidates=alive,
            origin=alive,
            media=media[alive],
            total=total,
            media_totals=tuple(images),
            attention_rows=rows,
        )
        kept = method(tokens, event)
        if kept is None:
            continue
        assert kept.numel() < before.numel()
        assert kept.unique().equal(kept)
        assert bool(torch.isin(kept, before).all())
        if scope == "per_image":
            for index, own in enumerate(images):
                mine = int((media[kept] == index).sum())
                assert mine == min(method.keep_count(event, own), int((media[before] == index).sum()))
        alive = kept
