"""LagKV: short prompts and budgets that the ends of the prompt would use up."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.registry import get

LAGKV = get("lagkv").method


def entries(total: int) -> Entries:
    return Entries.of(*torch.randn(2, 2, total, 4, generator=torch.Generator().manual_seed(total)))


def test_a_short_prompt_keeps_sinks_and_newest() -> None:
    kept = LAGKV(keep=5, sinks=2, lag=8)(entries(17)).kept
    assert kept[0].nonzero().squeeze(-1).tolist() == [0, 1, 14, 15, 16]


@pytest.mark.parametrize("kept", range(6, 59))
def test_sinks_and_end_always_stay(kept: int) -> None:
    found = LAGKV(keep=kept, sinks=4, lag=13)(entries(60))
    assert found.counts == [kept, kept]
    assert bool(found.kept[:, [0, 1, 2, 3, 59]].all())


def test_every_partition_gives_its_share() -> None:
    kept = LAGKV(keep=4 + 10 + 3 * 5, sinks=4, lag=10)(entries(44)).kept
    assert kept[:, 4:34].unflatten(1, (3, 10)).sum(dim=-1).tolist() == [[5, 5, 5]] * 2


def test_channels_that_never_change_are_no_danger() -> None:
    states = torch.ones(1, 30, 4)
    found = LAGKV(keep=14, sinks=0, lag=10)
    assert bool(found.scores(Entries.of(states, states), 14).isfinite().all())


@pytest.mark.parametrize(("field", "value"), [("lag", 0), ("lag", True), ("sinks", -1)])
def test_wrong_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        LAGKV(**{field: value})
