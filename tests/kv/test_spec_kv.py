"""SpecKV waits for the first tokens of the answer."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries, Step
from mmfast.registry import get


def states(length: int) -> torch.Tensor:
    return torch.randn(2, length, 4, generator=torch.Generator().manual_seed(length))


def test_nothing_goes_before_the_look_ahead_is_complete() -> None:
    method = get("spec_kv").method(keep=4, lookahead=3, window=2, kernel=1)
    keys, query = states(13), states(14)[:, :13].repeat(2, 1, 1)
    entries = Entries.of(keys[:, :10], keys[:, :10], query[:, :10])
    assert method(entries) is None
    for added in (1, 2, 3):
        end = 10 + added
        step = Step(keys[:, :end], keys[:, :end], query[:, end - 1 : end], end, added, memory=entries.memory)
        stays = method.step(step)
        assert (stays is None) == (added < 3)
    assert stays.sum(dim=-1).tolist() == [7, 7]
    assert bool(stays[:, 8:].all())
    assert not entries.memory


def test_the_choice_is_that_of_all_rows_at_once() -> None:
    """Window and look-ahead together choose as one window of the same tokens would."""
    method = get("spec_kv").method(keep=5, lookahead=2, window=3, kernel=3)
    keys, query = states(14), states(15)[:, :14].repeat(2, 1, 1)
    entries = Entries.of(keys[:, :12], keys[:, :12], query[:, :12])
    method(entries)
    for added in (1, 2):
        end = 12 + added
        stays = method.step(
            Step(keys[:, :end], keys[:, :end], query[:, end - 1 : end], end, added, memory=entries.memory)
        )
    whole = Entries.of(keys, keys, query)
    wanted = get("spec_kv").method(keep=7, window=5, kernel=3).retain(whole, 7).kept
    assert torch.equal(stays, wanted)


@pytest.mark.parametrize(
    "options", [{"lookahead": 0}, {"window": 0}, {"kernel": 4}, {"pooling": "sum"}, {"reduce": "sum"}]
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        get("spec_kv").method(**options)
