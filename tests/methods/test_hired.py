"""HiRED: shares of the whole image and its crops, by hand, and counts that add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.registry import get
from mmfast.tokens import Keep, Layout, VisualTokens
from support.anyres import anyres


def kept_of(layout: Layout, early: Tensor, late: Tensor, **options: Any) -> Keep:
    tokens = VisualTokens(torch.zeros(len(layout), 1), layout, signals={"early": early, "late": late})
    decision: Keep | None = get("hired").method(**options)(tokens)
    assert decision is not None
    return decision


def per_tile(layout: Layout, indices: Tensor) -> list[int]:
    """Count the kept tokens of the whole image and of each crop."""
    assert layout.crop is not None
    return torch.bincount(layout.crop[indices] + 1, minlength=layout.crop_grid[0] * layout.crop_grid[1] + 1).tolist()


def looking_at(layout: Layout, row: int, col: int) -> Tensor:
    """Attention that falls off with the distance from a place of the whole image."""
    apart = (layout.row - row).abs() + (layout.col - col).abs()
    return torch.where(layout.tile == 0, 1.0 / (1 + apart), torch.zeros(len(layout)))


def test_crops_share_by_the_regions_the_first_block_looks_at() -> None:
    """The four most attended of 16 tokens lie in the upper right quarter: all of the other half goes there."""
    layout, _ = anyres((2, 2), 4)
    early = ((layout.tile == 0) & (layout.row < 2) & (layout.col >= 2)).float()
    late = torch.arange(len(layout)).float()
    decision = kept_of(layout, early, late, keep=8, alpha=0.75)
    assert per_tile(layout, decision.indices) == [6, 0, 2, 0, 0]
    # Inside each the deep block decides, here for the last tokens.
    assert decision.indices[:6].tolist() == [10, 11, 12, 13, 14, 15]
    upper_right = (layout.crop == 1).nonzero().squeeze(-1)
    assert decision.indices[6:].equal(upper_right[-2:])


def test_official_strips_are_not_the_regions() -> None:
    layout, _ = anyres((2, 2), 4)
    early, late = looking_at(layout, 0, 3), torch.rand(len(layout), generator=torch.Generator().manual_seed(0))
    by_region = kept_of(layout, early, late, keep=20, alpha=0.75)
    by_strip = kept_of(layout, early, late, keep=20, alpha=0.75, compat="official")
    # (0,2), (0,3), (1,3) and one more at distance 2; the strips are the rows.
    assert per_tile(layout, by_region.indices)[2] > 2
    assert per_tile(layout, by_strip.indices)[1] > 2


def test_the_sum_sees_what_counting_does_not() -> None:
    """One token of the right half is looked at far more than two of the left."""
    layout, _ = anyres((1, 2), 2)
    early = torch.zeros(len(layout))
    early[:4] = torch.tensor([0.1, 0.8, 0.1, 0.0])
    late = torch.ones(len(layout))
    assert per_tile(layout, kept_of(layout, early, late, keep=4, alpha=0.25).indices) == [1, 2, 1]
    assert per_tile(layout, kept_of(layout, early, late, keep=6, alpha=0.2, score="sum").indices) == [1, 1, 4]


def test_official_code_leaves_leftovers_unused() -> None:
    layout, _ = anyres((1, 3), 3)
    generator = torch.Generator().manual_seed(1)
    early, late = torch.rand(len(layout), generator=generator), torch.rand(len(layout), generator=generator)
    counts = [
        (len(kept_of(layout, early, late, keep=kept, compat="official")), len(kept_of(layout, early, late, keep=kept)))
        for kept in range(2, 30)
    ]
    assert [ours for _, ours in counts] == list(range(2, 30))
    assert all(kept - 3 <= theirs <= kept for kept, (theirs, _) in zip(range(2, 30), counts, strict=True))
    assert any(theirs < ours for theirs, ours in counts)


def test_images_that_are_not_cut_keep_their_best() -> None:
    late = torch.tensor([0.1, 0.4, 0.2, 0.4, 0.3, 0.0])
    decision = kept_of(Layout.grid(2, 3), torch.zeros(6), late, keep=3)
    assert decision.indices.tolist() == [1, 3, 4]


@settings(deadline=None)
@given(
    grid=st.sampled_from([(1, 2), (2, 2), (3, 1), (1, 4)]),
    padding=st.sampled_from([(0, 0), (1, 0), (0, 1), (2, 0)]),
    keep=st.integers(1, 90),
    alpha=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    score=st.sampled_from(["count", "sum"]),
    scope=st.sampled_from(["global", "per_tile"]),
    constant=st.booleans(),
    seed=st.integers(0, 3),
)
def test_counts_are_exact(
    grid: tuple[int, int],
    padding: tuple[int, int],
    keep: int,
    alpha: float,
    score: str,
    scope: str,
    constant: bool,
    seed: int,
) -> None:
    """Also where padding takes whole crops away."""
    layout, _ = anyres(grid, 5, *padding)
    early, late = torch.rand(2, len(layout), generator=torch.Generator().manual_seed(seed))
    early = torch.zeros_like(early) if constant else early
    keep = min(keep, len(layout) - 1)
    decision = kept_of(layout, early, late, keep=keep, alpha=alpha, score=score, scope=scope)
    assert len(decision) == keep
    if scope == "global" and alpha == 0.0:
        assert layout.crop is not None
        assert int((layout.crop[decision.indices] >= 0).sum()) == min(keep, int((layout.crop >= 0).sum()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5 must lie in"),
        ({"score": "mean"}, "score='mean' must be one of"),
        ({"compat": "paper"}, "compat='paper' must be one of"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("hired").method(**options)
