"""GlobalCom2: what the thumbnail says about crops, and counts that add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.before_llm.globalcom2 import fitted
from mmfast.tokens import Keep, Layout, VisualTokens
from support.anyres import anyres


def kept_of(layout: Layout, logits: Tensor, **options: Any) -> Keep:
    features = torch.arange(len(layout)).float()[:, None]
    decision: Keep | None = get("globalcom2").method(**options)(
        VisualTokens(features, layout, signals={"logits": logits})
    )
    assert decision is not None
    return decision


def per_tile(layout: Layout, indices: Tensor) -> list[int]:
    assert layout.crop is not None
    return torch.bincount(layout.crop[indices] + 1, minlength=layout.crop_grid[0] * layout.crop_grid[1] + 1).tolist()


def test_a_region_of_high_scores_keeps_more_of_its_crop() -> None:
    """All weight on one of four crops: it may keep 1.75 times the share, the others 0.75 times."""
    layout, _ = anyres((2, 2), 4)
    logits = torch.where((layout.tile == 0) & (layout.row < 2) & (layout.col >= 2), 100.0, 0.0)
    counts = per_tile(layout, kept_of(layout, logits, keep=40).indices)
    assert counts == [8, 6, 14, 6, 6]


def test_inside_a_crop_the_thumbnail_has_a_say() -> None:
    """The crop's own scores are even, so that of its four rows those the thumbnail scores high stay."""
    layout, _ = anyres((1, 2), 4)
    logits = torch.where(layout.tile == 0, layout.row.float() + 1.0, torch.ones(len(layout)))
    decision = kept_of(layout, logits, keep=24)
    crops = decision.indices[layout.tile[decision.indices] == 1]
    assert set(layout.row[crops].tolist()) == {2, 3}


def test_official_counts_are_cut_off_and_the_thumbnail_comes_by_score() -> None:
    layout, _ = anyres((2, 2), 5, left=1)
    logits = torch.randn(len(layout), generator=torch.Generator().manual_seed(2))
    official = kept_of(layout, logits, keep=0.25, compat="official")
    ours = kept_of(layout, logits, keep=0.25)
    assert len(ours) == round(0.25 * len(layout))
    assert len(official) < len(ours)
    assert torch.isin(official.indices, ours.indices).all()
    assert official.features is not None
    assert official.source is not None
    order = official.features[:, 0].long()
    assert order.sort().values.equal(official.indices)
    assert official.source[order].equal(torch.arange(len(order)))
    thumbnail = order[layout.tile[order] == 0]
    assert len(thumbnail) == 6
    assert logits[thumbnail].equal(logits[:25].sort(descending=True).values[:6])
    # Where columns of padding are missing, lines of a crop run into each other.
    assert not order[6:].equal(order[6:].sort().values)


@pytest.mark.parametrize("compat", [None, "official"])
def test_images_that_are_not_cut_keep_their_best(compat: str | None) -> None:
    decision = kept_of(Layout.grid(2, 3), torch.tensor([-1.0, 0.4, 0.2, 0.4, 0.3, -5.0]), keep=3, compat=compat)
    assert decision.indices.tolist() == [1, 3, 4]
    assert decision.features is None


@settings(deadline=None)
@given(
    grid=st.sampled_from([(1, 2), (2, 2), (3, 1), (1, 4)]),
    padding=st.sampled_from([(0, 0), (1, 0), (0, 1), (2, 0)]),
    keep=st.integers(1, 90),
    scope=st.sampled_from(["global", "per_tile"]),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 3),
)
def test_counts_are_exact(
    grid: tuple[int, int], padding: tuple[int, int], keep: int, scope: str, scale: float, seed: int
) -> None:
    layout, _ = anyres(grid, 5, *padding)
    logits = scale * torch.randn(len(layout), generator=torch.Generator().manual_seed(seed))
    keep = min(keep, len(layout) - 1)
    assert len(kept_of(layout, logits, keep=keep, scope=scope)) == keep


@given(parts=st.lists(st.tuples(st.floats(0, 50), st.integers(0, 40)), min_size=1, max_size=8), data=st.data())
def test_fitted_counts_add_up_and_fit(parts: list[tuple[float, int]], data: st.DataObject) -> None:
    wanted, sizes = [want for want, _ in parts], [size for _, size in parts]
    total = data.draw(st.integers(0, sum(sizes)))
    counts = fitted(wanted, sizes, total)
    assert sum(counts) == total
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


def test_counts_that_add_up_are_left_alone() -> None:
    assert fitted([3.0, 4.0, 5.0], [9, 9, 9], 12) == [3, 4, 5]
    # The largest remainders get what is left.
    assert fitted([3.2, 4.7, 5.1], [9, 9, 9], 13) == [3, 5, 5]


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="compat='paper' must be one of"):
        get("globalcom2").method(compat="paper")
