"""H2O: sums that follow what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfast.kv.entries import Entries, Step
from mmfast.kv.eviction.h2o import H2O
from mmfast.token_pruning.attention import AttentionView

LENGTH, STEPS = 12, 6


def states(heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    query, key, value = (torch.randn(count, LENGTH + STEPS, 8) * 2 for count in (heads, groups, groups))
    return query, key, value


def generate(method: H2O, query: Tensor, key: Tensor, value: Tensor, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Follow a prompt with steps; before what is stored stands padding, as in a batch.

    Returns:
        places ``[G, S]`` of what is stored in the end, and what it has received.
    """
    groups = key.shape[0]
    entries = Entries.of(key[:, :LENGTH], value[:, :LENGTH], query[:, :LENGTH])
    retained = method(entries)
    places = torch.arange(LENGTH).expand(groups, -1)
    if retained is not None:
        places = places[retained.by_head(groups)].view(groups, -1)
    for token in range(LENGTH, LENGTH + STEPS):
        places = torch.cat([places, torch.full((groups, 1), token)], dim=-1)
        stored = torch.cat([torch.full((groups, padding), token), places], dim=-1)
        wide = stored[..., None].expand(-1, -1, 8)
        real = (torch.arange(stored.shape[1]) >= padding).expand(groups, -1)
        step = Step(
            key.gather(1, wide),
            value.gather(1, wide),
            query[:, token : token + 1],
            token + 1,
            token + 1 - LENGTH,
            real=real if padding else None,
            memory=entries.memory,
        )
        mask = method.step(step)
        if mask is not None:
            assert entries.memory["received"].shape == real.shape
            keep = mask & real
            places = stored[keep].view(groups, -1)
            entries.memory["received"] = entries.memory["received"][keep].view(groups, -1)
    return places, entries.memory["received"]


def test_one_entry_goes_per_step() -> None:
    for keep in (1, 2, 7, 11):
        places, sums = generate(H2O(keep=keep), *states(4, 2))
        assert places.shape == sums.shape == (2, keep)
        recent = round(0.5 * keep)
        newest = torch.arange(LENGTH + STEPS - recent, LENGTH + STEPS).expand(2, -1)
        assert torch.equal(places[:, keep - recent :], newest)


def test_padding_changes_nothing() -> None:
    plain = generate(H2O(keep=7), *states(4, 2))
    padded = generate(H2O(keep=7), *states(4, 2), padding=3)
    assert torch.equal(plain[0], padded[0])
    assert torch.allclose(plain[1], padded[1])


def test_without_evictions_the_sums_are_those_of_the_whole_sequence() -> None:
    query, key, value = states(4, 2)
    whole = AttentionView(query, key).column_sums(torch.ones(LENGTH + STEPS), heads="each")
    for keep in (1.0, 100):
        places, sums = generate(H2O(keep=keep), query, key, value)
        assert torch.equal(places, torch.arange(LENGTH + STEPS).expand(2, -1))
        assert torch.allclose(sums, whole.view(2, 2, -1).mean(dim=1), atol=1e-5)


def test_tokens_that_came_without_a_step_start_at_zero() -> None:
    query, key, value = states(2, 2)
    method, entries = H2O(keep=100), Entries.of(key[:, :4], value[:, :4], query[:, :4])
    assert method(entries) is None
    before = entries.memory["received"]
    step = Step(key[:, :7], value[:, :7], query[:, 6:7], 7, 3, memory=entries.memory)
    assert method.step(step) is None
    expected = step.probabilities()
    expected[:, :4] += before
    assert torch.allclose(entries.memory["received"], expected)


def test_sums_of_taken_back_tokens_are_forgotten() -> None:
    query, key, value = states(2, 2)
    method, entries = H2O(keep=100), Entries.of(key[:, :4], value[:, :4], query[:, :4])
    assert method(entries) is None
    before = entries.memory["received"]
    once = Step(key[:, :5], value[:, :5], query[:, 4:5], 5, 1, memory=entries.memory)
    for _ in range(2):
        assert method.step(once) is None
    expected = 2 * once.probabilities()
    expected[:, :4] += before
    expected[:, 4] /= 2
    assert torch.allclose(entries.memory["received"], expected)


def test_earlier_turns_are_left_alone() -> None:
    query, key, value = states(2, 2)
    method, entries = H2O(keep=3, recent=1.0), Entries.of(key[:, 5:10], value[:, 5:10], query[:, 5:10])
    assert method(entries) is not None
    stored = torch.tensor([0, 1, 2, 3, 4, 7, 8, 9, 10])
    for added in (1, 2):
        now = stored if added == 1 else torch.cat([stored[[0, 1, 2, 3, 4, 6, 7, 8]], torch.tensor([11])])
        step = Step(
            key[:, now], value[:, now], query[:, 9 + added : 10 + added], 5 + added, added, memory=entries.memory
        )
        mask = method.step(step)
        assert mask is not None
        assert (~mask).nonzero().tolist() == [[0, 5], [1, 5]]
        entries.memory["received"] = entries.memory["received"][mask].view(2, -1)


@pytest.mark.parametrize("recent", [-0.1, 1.5, True, "half"])
def test_refuses_recent(recent: object) -> None:
    with pytest.raises(ValueError, match="recent="):
        H2O(recent=recent)  # type: ignore[arg-type]
