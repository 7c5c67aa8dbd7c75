"""StreamingLLM: decode steps, and the books that all decode policies share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfast.kv.entries import Entries, Step
from mmfast.kv.eviction.streaming_llm import StreamingLLM


def prompt(length: int) -> Entries:
    return Entries.of(torch.zeros(2, length, 4), torch.zeros(2, length, 4))


def step_of(entries: Entries, stored: int, added: int, real: Tensor | None = None) -> Step:
    states = torch.zeros(2, stored, 4)
    return Step(states, states, torch.zeros(2, 1, 4), len(entries) + added, added, real=real, memory=entries.memory)


def generate(method: StreamingLLM, length: int, steps: int) -> list[int]:
    """Return the logical places of what is stored in the end."""
    entries = prompt(length)
    retained = method(entries)
    stored = torch.arange(length) if retained is None else retained.kept.nonzero().squeeze(-1)
    for added in range(1, steps + 1):
        stored = torch.cat([stored, torch.tensor([length + added - 1])])
        mask = method.step(step_of(entries, len(stored), added))
        stored = stored if mask is None else stored[mask]
    return stored.tolist()


def test_total_stays_constant() -> None:
    assert generate(StreamingLLM(keep=5, start=2), 10, 0) == [0, 1, 7, 8, 9]
    assert generate(StreamingLLM(keep=5, start=2), 10, 4) == [0, 1, 11, 12, 13]
    assert generate(StreamingLLM(keep=0.5, start=2), 10, 4) == [0, 1, 11, 12, 13]


def test_count_is_filled_up_before_anything_goes() -> None:
    assert generate(StreamingLLM(keep=5, start=2), 3, 2) == [0, 1, 2, 3, 4]
    assert generate(StreamingLLM(keep=5, start=2), 3, 3) == [0, 1, 3, 4, 5]


def test_whole_fraction_keeps_everything() -> None:
    assert generate(StreamingLLM(keep=1.0), 3, 3) == [0, 1, 2, 3, 4, 5]


def test_newest_entry_always_has_room() -> None:
    assert generate(StreamingLLM(keep=3, start=8), 10, 2) == [0, 1, 11]


def test_padding_is_not_counted() -> None:
    method, entries = StreamingLLM(keep=4, start=1), prompt(8)
    assert method(entries) is not None
    real = torch.tensor([False, False, True, True, True, True, True]).expand(2, -1)
    mask = method.step(step_of(entries, 7, 1, real))
    assert mask is not None
    assert (mask & real[0]).nonzero().squeeze(-1).tolist() == [2, 4, 5, 6]


def test_earlier_turns_are_left_alone() -> None:
    """Six entries of an earlier turn stand before what this prompt left."""
    method, entries = StreamingLLM(keep=4, start=1), prompt(8)
    assert method(entries) is not None
    mask = method.step(step_of(entries, 6 + 5, 1))
    assert mask is not None
    assert (~mask).nonzero().flatten().tolist() == [7]


def test_tokens_may_come_without_a_step() -> None:
    method, entries = StreamingLLM(keep=4, start=1), prompt(8)
    assert method(entries) is not None
    mask = method.step(step_of(entries, 4 + 3, 3))
    assert mask is not None
    assert mask.tolist() == [True, False, False, False, True, True, True]


def test_step_without_a_prompt_keeps_everything() -> None:
    assert StreamingLLM(keep=2).step(Step(*(torch.zeros(1, 9, 4),) * 2, torch.zeros(1, 1, 4), 9)) is None


@pytest.mark.parametrize("start", [-1, 1.5, True])
def test_refuses_start(start: object) -> None:
    with pytest.raises(ValueError, match="start="):
        StreamingLLM(start=start)  # type: ignore[arg-type]
