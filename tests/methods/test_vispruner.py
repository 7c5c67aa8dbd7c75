"""VisPruner: counts at which the official code fails, and ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmfast.registry import get
from mmfast.token_pruning import similarity
from mmfast.token_pruning.before_llm.vispruner import important_and_diverse


@settings(deadline=None)
@given(
    total=st.integers(1, 90),
    kept=st.integers(1, 90),
    share=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    duplicates=st.booleans(),
)
@example(total=77, kept=17, share=0.5, duplicates=False)
@example(total=50, kept=1, share=0.5, duplicates=False)
def test_exactly_k_come_out(total: int, kept: int, share: float, duplicates: bool) -> None:
    kept = min(kept, total)
    generator = torch.Generator().manual_seed(total)
    features, attention = torch.randn(total, 4, generator=generator), torch.rand(total, generator=generator)
    if duplicates:
        features[:] = features[:1]
    important = int(kept * share)
    chosen = important_and_diverse(features, attention, kept, important)
    assert chosen.numel() == chosen.unique().numel() == kept
    assert chosen[:important].equal(attention.argsort(descending=True)[:important])


def test_only_attention_counts_for_a_share_of_one() -> None:
    attention = torch.tensor([0.1, 0.3, 0.2, 0.3])
    assert important_and_diverse(torch.randn(4, 3), attention, 3, 3).tolist() == [1, 3, 2]


def test_the_matrix_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features, attention = torch.randn(101, 8, generator=generator), torch.rand(101, generator=generator)
    chosen = important_and_diverse(features, attention, 20, 10)
    monkeypatch.setattr(similarity, "MATRIX_LIMIT", 0)
    monkeypatch.setattr(similarity, "_BLOCK_ELEMENTS", 200)
    assert important_and_diverse(features, attention, 20, 10).equal(chosen)


@pytest.mark.parametrize("share", [-0.1, 1.5, True])
def test_bad_shares_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"important=.* must lie in \[0, 1\]"):
        get("vispruner").method(important=share)
