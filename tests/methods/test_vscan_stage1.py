"""VScan, first stage: windows over any grid, counts, and what is merged into what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.registry import get
from mmfast.token_pruning.before_llm.vscan_stage1 import windows_of
from mmfast.tokens import Keep, Layout, VisualTokens


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reduced(layout: Layout, shallow: Tensor, deep: Tensor, features: Tensor | None = None, **options: Any) -> Keep:
    features = drawn(len(layout), 4) if features is None else features
    tokens = VisualTokens(features, layout, signals={"shallow": shallow, "deep": deep})
    decision: Keep | None = get("vscan_stage1").method(**options)(tokens)
    assert decision is not None
    return decision


def test_official_counts_lose_what_does_not_divide_by_the_windows() -> None:
    shallow, deep = drawn(2, 576).softmax(dim=1)
    layout = Layout.grid(24, 24)
    official = {keep: len(reduced(layout, shallow, deep, keep=keep, compat="official")) for keep in (20, 40, 64)}
    assert official == {20: 10, 40: 36, 64: 64}
    assert [len(reduced(layout, shallow, deep, keep=keep)) for keep in official] == [20, 40, 64]


def test_every_window_keeps_its_best() -> None:
    """An 8 x 8 grid has 2 x 2 tokens per window; the deep block looks at the first row alone."""
    layout = Layout.grid(8, 8)
    shallow = (layout.row % 2 + layout.col % 2).float()
    deep = (layout.row == 0).float()
    decision = reduced(layout, shallow, deep, keep=32)
    assert torch.bincount(windows_of(layout)[decision.indices]).min() >= 1
    best = (layout.row % 2 == 1) & (layout.col % 2 == 1)
    assert bool(torch.isin(best.nonzero().squeeze(-1), decision.indices).all())
    assert bool(torch.isin(torch.arange(8), decision.indices).all())


@given(height=st.integers(1, 30), width=st.integers(1, 30))
def test_windows_cut_a_grid_into_four_by_four(height: int, width: int) -> None:
    windows = windows_of(Layout.grid(height, width)).view(height, width)
    assert len(windows.unique()) == min(height, 4) * min(width, 4)
    rows = torch.bincount(windows[:, 0] // 4, minlength=4)
    assert int(rows.max() - rows.min()) <= 1


def test_dropped_tokens_are_averaged_into_the_kept_one_they_resemble() -> None:
    features = torch.tensor([[1.0, 0.0], [3.0, 0.3], [0.0, 1.0], [0.1, 5.0], [0.0, 3.0]])
    deep = torch.tensor([0.9, 0.0, 0.8, 0.0, 0.0])
    decision = reduced(Layout.unknown(5), torch.zeros(5), deep, features, keep=2)
    assert decision.indices.tolist() == [0, 2]
    assert decision.features is not None
    torch.testing.assert_close(decision.features, torch.tensor([[2.0, 0.15], [0.1 / 3, 3.0]]))
    assert decision.source is not None
    assert decision.source.tolist() == [0, 0, 1, 1, 1]
    assert decision.sizes is not None
    assert decision.sizes.tolist() == [2.0, 3.0]


@settings(deadline=None)
@given(
    side=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    keep=st.integers(1, 80),
    known=st.booleans(),
    even=st.booleans(),
)
def test_counts_are_exact_and_means_are_kept(side: tuple[int, int], keep: int, known: bool, even: bool) -> None:
    layout = Layout.grid(*side) if known else Layout.unknown(side[0] * side[1])
    total = len(layout)
    keep = min(keep, total - 1)
    if keep < 1:
        return
    shallow, deep = torch.zeros(2, total) if even else drawn(2, total, seed=keep).softmax(dim=1)
    features = drawn(total, 4, seed=1)
    decision = reduced(layout, shallow, deep, features, keep=keep)
    assert len(decision) == keep
    assert decision.features is not None
    assert decision.sizes is not None
    # Nothing is lost: means times sizes add up to all features.
    torch.testing.assert_close(
        (decision.features * decision.sizes[:, None]).sum(dim=0), features.sum(dim=0), atol=1e-4, rtol=1e-4
    )


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="compat='paper' must be one of"):
        get("vscan_stage1").method(compat="paper")
