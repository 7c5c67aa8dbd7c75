"""FoPru: patches and rows worked out by hand, and exact counts of either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.registry import get
from mmfast.tokens import Layout, VisualTokens


def kept_of(layout: Layout, significance: Tensor, **options: Any) -> list[int]:
    tokens = VisualTokens(torch.zeros(len(layout), 1), layout, signals={"significance": significance})
    decision = get("fopru").method(**options)(tokens)
    assert decision is not None
    kept: list[int] = decision.indices.tolist()
    return kept


SIGNIFICANCE = torch.tensor([[0.9, 0.0, 0.0], [0.3, 0.4, 0.5], [0.6, 0.1, 0.0], [0.1, 0.2, 0.1]]).flatten()


def test_single_patches_and_whole_rows() -> None:
    """Row sums are 0.9, 1.2, 0.7, 0.4."""
    layout = Layout.grid(4, 3)
    assert kept_of(layout, SIGNIFICANCE, keep=3) == [0, 5, 6]
    assert kept_of(layout, SIGNIFICANCE, keep=3, strategy="row") == [3, 4, 5]
    assert kept_of(layout, SIGNIFICANCE, keep=6, strategy="row") == [0, 1, 2, 3, 4, 5]


def test_the_last_row_is_cut_to_its_best_patches() -> None:
    layout = Layout.grid(4, 3)
    assert kept_of(layout, SIGNIFICANCE, keep=2, strategy="row") == [4, 5]
    assert kept_of(layout, SIGNIFICANCE, keep=7, strategy="row") == [0, 1, 2, 3, 4, 5, 6]


def test_rows_of_frames_are_rows_of_their_own() -> None:
    layout = Layout.grid(2, 2, frames=2, modality="video")
    significance = torch.tensor([0.0, 0.1, 0.5, 0.5, 0.4, 0.4, 0.0, 0.0])
    assert kept_of(layout, significance, keep=4, strategy="row", scope="global") == [2, 3, 4, 5]
    assert kept_of(layout, 10 * significance, keep=2, strategy="row", scope="global") == [2, 3]


def test_without_a_grid_patches_are_kept_one_by_one() -> None:
    assert kept_of(Layout.unknown(12), SIGNIFICANCE, keep=3, strategy="row") == [0, 5, 6]


@settings(deadline=None)
@given(height=st.integers(1, 7), width=st.integers(1, 7), keep=st.integers(1, 48), even=st.booleans())
def test_rows_stay_whole_but_for_one(height: int, width: int, keep: int, even: bool) -> None:
    total = height * width
    keep = min(keep, total - 1)
    if keep < 1:
        return
    significance = (
        torch.full((total,), 0.5) if even else torch.rand(total, generator=torch.Generator().manual_seed(keep))
    )
    kept = kept_of(Layout.grid(height, width), significance, keep=keep, strategy="row")
    assert len(kept) == keep
    per_row = torch.bincount(torch.tensor(kept) // width, minlength=height)
    assert int(((per_row > 0) & (per_row < width)).sum()) <= 1


def test_the_score_names_the_signal() -> None:
    assert get("fopru").method().vision_signals()["significance"].kind == "received_attention"
    assert get("fopru").method(score="cls").vision_signals()["significance"].kind == "cls_attention"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"strategy": "column"}, "strategy='column' must be"), ({"score": "max"}, "score='max' must be")],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("fopru").method(**options)
