"""Elastic Cache: a case by hand, what never moves, and the point at which steps evict."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries, Step
from mmfast.kv.eviction.elastic_cache import ElasticCache


class Given(ElasticCache):
    """With attention that is given: entry 3 and 6 of eight are worth most."""

    def scores(self, entries: Entries) -> torch.Tensor:
        return torch.tensor([0.0, 1.0, 2.0, 9.0, 4.0, 3.0, 8.0, 0.0])


def counting() -> Entries:
    places = torch.arange(8.0)[None, :, None]
    return Entries.of(places, places * 10)


def test_entries_melt_into_the_nearest() -> None:
    retained = Given(keep=4)(counting())
    assert retained is not None
    assert retained.keys is not None
    assert retained.values is not None
    assert retained.kept.nonzero().squeeze(-1).tolist() == [0, 3, 6, 7]
    # 1, 2 and 4 go into 3, 5 goes into 6; the ends take nothing.
    assert retained.keys[0, retained.kept, 0].tolist() == [0.0, 2.5, 5.5, 7.0]
    assert retained.values[0, retained.kept, 0].tolist() == [0.0, 25.0, 55.0, 70.0]


def test_of_two_equally_near_the_lower_takes() -> None:
    class Apart(ElasticCache):
        def scores(self, entries: Entries) -> torch.Tensor:
            return torch.tensor([0.0, 9.0, 0.0, 8.0, 0.0])

    places = torch.arange(5.0)[None, :, None]
    retained = Apart(keep=4)(Entries.of(places, places))
    assert retained is not None
    assert retained.keys is not None
    assert retained.keys[0, retained.kept, 0].tolist() == [0.0, 1.5, 3.0, 4.0]


@pytest.mark.parametrize("kept", [1, 2])
def test_ends_alone_take_nothing(kept: int) -> None:
    retained = Given(keep=kept)(counting())
    assert retained is not None
    assert retained.keys is None
    assert retained.kept.nonzero().squeeze(-1).tolist() == [0, 7][-kept:]


def test_fraction_is_rounded_up() -> None:
    assert ElasticCache(keep=0.5).keep_count(63) == 32
    assert ElasticCache(keep=0.5).keep_count(64) == 32
    assert ElasticCache(keep=40).keep_count(64) == 40


@pytest.mark.parametrize("keep", [40, 0.5])
def test_steps_leave_a_share_of_all_tokens(keep: int | float) -> None:
    states = torch.randn(2, 80, 4, generator=torch.Generator().manual_seed(0))
    method, entries = ElasticCache(keep=keep, distance=-8), Entries.of(states, states, states)
    assert method(entries) is not None
    stored, gone = 40, []
    for added in range(1, 21):
        now = torch.zeros(2, stored + 1, 4)
        mask = method.step(Step(now, now, now[:, :1], 80 + added, added, memory=entries.memory))
        gone += [] if mask is None else (~mask).nonzero().flatten().tolist()
        stored = stored + 1 if mask is None else int(mask.sum())
        assert 0 <= stored - 0.5 * (80 + added) < 1
    # Every other token makes one go: always the one eight before the end of what the prompt left.
    assert gone == [32] * 10


def test_step_in_a_batch_counts_its_own_entries() -> None:
    method, entries = Given(keep=4, distance=-2), counting()
    assert method(entries) is not None
    real = torch.tensor([False] * 3 + [True] * 6).expand(1, -1)
    states = torch.zeros(1, 9, 4)
    mask = method.step(Step(states, states, states[:, :1], 10, 2, real=real, memory=entries.memory))
    assert mask is not None
    assert (~mask).nonzero().flatten().tolist() == [3 + 2]


@pytest.mark.parametrize("distance", [1.0, True, None])
def test_refuses_distance(distance: object) -> None:
    with pytest.raises(ValueError, match="distance="):
        ElasticCache(distance=distance)  # type: ignore[arg-type]
