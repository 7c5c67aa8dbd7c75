"""AIM inside the language model: what the official vectors do not say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.in_llm.aim_prune import AIMPrune, falling_rates, page_rank
from support.attention import DenseAttention


@given(keep=st.floats(0.0, 1.0), span=st.floats(1.0, 40.0), depth=st.integers(2, 40))
def test_rates_fall_and_average_to_keep(keep: float, span: float, depth: int) -> None:
    keep = max(keep, 1 / depth)
    rates = falling_rates(keep, span, depth)
    assert len(rates) == depth - 1
    assert all(0.0 <= after <= before <= 1.0 for before, after in zip([1.0, *rates], rates, strict=False))
    assert (1.0 + sum(rates)) / depth == pytest.approx(keep, abs=1e-6)


@pytest.mark.parametrize(("depth", "keep", "span", "first"), [(28, 18.5 / 28, 8 / 28, 15), (32, 0.546875, 8, 14)])
def test_the_published_schedules(depth: int, keep: float, span: float, first: int) -> None:
    counts = AIMPrune(keep=keep, span=span).counts(160, depth)
    steps = [160] * (first - 1) + [140, 120, 100, 80, 60, 40, 20]
    assert counts == steps + [0] * (depth - 1 - len(steps))


def test_events_that_drop_nothing_are_left_out() -> None:
    method = AIMPrune()
    assert [event.layer for event in method.events(28) if method.drops(event, (576,))] == list(range(15, 23))


def test_received_attention_is_one_round() -> None:
    weights = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)).tril()
    weights /= weights.sum(dim=-1, keepdim=True)
    found = page_rank(DenseAttention.of(weights), iterations=1, temperature=1.0)
    torch.testing.assert_close(found, weights.mean(dim=1).square().mean(dim=0).sqrt())


def test_damping_spreads_importance_evenly() -> None:
    weights = torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(1)).tril()
    weights /= weights.sum(dim=-1, keepdim=True)
    flow = torch.full((5,), 0.2)
    for _ in range(3):
        flow = (flow @ weights[0]) * 0.7 + 0.3 * 0.2
    found = page_rank(DenseAttention.of(weights), iterations=3, temperature=1.0, damping=0.3)
    torch.testing.assert_close(found, flow)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_logits_in_half_precision_stay_finite(dtype: torch.dtype) -> None:
    states = (torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(2)) * 60).to(dtype)
    assert bool(page_rank(AttentionView(states, states[:2])).isfinite().all())


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"span": 1.5}, {"iterations": 0}, {"temperature": 0.0}, {"damping": 1.0}]
)
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}="):
        AIMPrune(**options)


def test_what_cannot_be_reached_is_said() -> None:
    method = AIMPrune(keep=0.07)
    assert method.notice(5).startswith("keep=0.07 as an average over the layers cannot be reached")
    assert method.counts(16, 5) == [0] * 4
    assert AIMPrune(keep=0.2).notice(5) == ""
