"""HiPrune: anchors and neighbours on the grid, and by the flat index."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.before_llm.hiprune import neighbours
from mmfast.tokens import Layout, VisualTokens


def kept_of(layout: Layout, middle: Tensor, deep: Tensor, **options: Any) -> list[int]:
    tokens = VisualTokens(torch.zeros(len(layout), 1), layout, signals={"object": middle, "deep": deep})
    decision = get("hiprune").method(**options)(tokens)
    assert decision is not None
    kept: list[int] = decision.indices.tolist()
    return kept


def test_neighbours_follow_the_grid_and_wrap_in_the_official_code() -> None:
    """The anchor is the last token of the first row of 3 x 4; nothing else is looked at but tokens 10 and 11."""
    layout = Layout.grid(3, 4)
    middle, deep = torch.zeros(12), torch.zeros(12)
    middle[3], deep[10], deep[11] = 1.0, 0.5, 0.4
    assert kept_of(layout, middle, deep, keep=5, alpha=1.0) == [2, 3, 7, 10, 11]
    # One to the right is the first token of the next row, one row up is clamped to token 0.
    assert kept_of(layout, middle, deep, keep=5, alpha=1.0, compat="official") == [0, 2, 3, 4, 7]


def test_the_deep_block_fills_up() -> None:
    """A tenth of ten tokens is no anchor."""
    middle, deep = torch.zeros(16), torch.arange(16).float()
    middle[0] = 1.0
    assert kept_of(Layout.grid(4, 4), middle, deep, keep=10) == list(range(6, 16))
    assert kept_of(Layout.grid(4, 4), middle, deep, keep=10, alpha=0.5) == [0, 1, 4, *range(9, 16)]


@settings(deadline=None)
@given(
    side=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    frames=st.integers(1, 2),
    keep=st.integers(1, 60),
    alpha=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    compat=st.sampled_from([None, "official"]),
    known=st.booleans(),
    scope=st.sampled_from(["global", "per_tile"]),
)
def test_counts_are_exact(
    side: tuple[int, int], frames: int, keep: int, alpha: float, compat: str | None, known: bool, scope: str
) -> None:
    layout = Layout.grid(*side, frames=frames) if known else Layout.unknown(side[0] * side[1] * frames)
    keep = min(keep, len(layout) - 1)
    if keep < 1:
        return
    middle, deep = torch.rand(2, len(layout), generator=torch.Generator().manual_seed(keep))
    assert len(kept_of(layout, middle, deep, keep=keep, alpha=alpha, compat=compat, scope=scope)) == keep


@given(side=st.tuples(st.integers(1, 6), st.integers(1, 6)), frames=st.integers(1, 3), seed=st.integers(0, 50))
def test_neighbours_are_one_step_away_in_the_same_frame(side: tuple[int, int], frames: int, seed: int) -> None:
    """Also where the grid has holes."""
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.grid(*side, frames=frames)
    layout = layout.take((torch.rand(len(layout), generator=generator) > 0.2).nonzero().squeeze(-1))
    if not len(layout):
        return
    places = torch.randperm(len(layout), generator=generator)[: 1 + len(layout) // 4]
    where = list(zip(layout.frame.tolist(), layout.row.tolist(), layout.col.tolist(), strict=True))
    expected = {
        index
        for index, (frame, row, col) in enumerate(where)
        for other in places.tolist()
        if where[other][0] == frame and abs(where[other][1] - row) + abs(where[other][2] - col) == 1
    }
    assert neighbours(places, layout).tolist() == sorted(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": 1.5}, "alpha=1.5 must lie in"), ({"compat": "paper"}, "compat='paper' must be one of")],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("hiprune").method(**options)
