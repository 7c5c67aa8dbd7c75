"""LServe: which heads stream, what pages are worth, and when they are chosen anew."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.lserve import streaming_heads
from mmfast.registry import get


def test_heads_that_look_at_both_ends_stream() -> None:
    rows = torch.zeros(3, 2, 6)
    rows[0, :, 2] = 1.0
    rows[1, :, 0] = 1.0
    # Each row has its own end: places 3 and 4 for the last token but one, 4 and 5 for the last.
    rows[2, 0, 3], rows[2, 1, 3] = 1.0, 1.0
    assert streaming_heads(rows, 1, 2, 0.4).tolist() == [False, True, False]
    assert streaming_heads(rows, 1, 2, 0.7).tolist() == [False, True, True]
    assert streaming_heads(rows, 1, 2, 0.0).tolist() == [False, False, False]


def prompt() -> Entries:
    """Two heads of twelve keys, three pages; the second head looks at its first key only."""
    keys = torch.zeros(2, 12, 2)
    # Page 0 has large channels in keys far from each other, the others a key with two smaller ones.
    keys[0, 0], keys[0, 2] = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 4.0])
    keys[0, 5], keys[0, 9] = 3.0, 2.5
    keys[1, 0] = 20.0
    return Entries.of(keys, keys, torch.ones(2, 12, 2))


@pytest.mark.parametrize(("parts", "pages"), [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (2, [4, 5, 6, 7, 8, 9, 10, 11])])
def test_heads_read_the_ends_or_pages_and_finer_bounds_see_through_channels_that_never_meet(
    parts: int, pages: list[int]
) -> None:
    entries = prompt()
    method = get("lserve").method(keep=8, sinks=1, local=2, page_size=4, parts=parts, window=4, dense_layers=0)
    method.prepare(entries)
    keys = torch.cat([entries.keys, torch.zeros(2, 1, 2)], dim=1)
    chosen = method.choose(Step(keys, keys, torch.ones(2, 1, 2), seen=13, memory=entries.memory))
    # As wholes the pages are worth 8, 6 and 5; the halves of the first are worth 4 each.
    assert chosen[0].nonzero().squeeze(-1).tolist() == [*pages, 12]
    # The new entry is one of the two newest.
    assert chosen[1].nonzero().squeeze(-1).tolist() == [0, 11, 12]


def test_pages_stay_for_a_few_steps() -> None:
    keys = torch.zeros(1, 16, 2)
    keys[0, 0], keys[0, 4] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    entries = Entries.of(keys[:, :8], keys[:, :8], torch.ones(1, 8, 2))
    method = get("lserve").method(keep=1, page_size=1, interval=3, streaming_heads=0.0, dense_layers=0)
    method.prepare(entries)
    read = []
    for added in range(1, 5):
        stored = keys[:, : 8 + added]
        query = torch.tensor([[[1.0, 0.0]]]) if added == 1 else torch.tensor([[[0.0, 1.0]]])
        step = Step(stored, stored, query, seen=8 + added, added=added, memory=entries.memory)
        read.append(method.choose(step)[0, [0, 4]].tolist())
    assert read == [[True, False], [True, False], [True, False], [False, True]]


@pytest.mark.parametrize("bad", [{"streaming_heads": 1.5}, {"sinks": -1}, {"page_size": 0}, {"interval": 0}])
def test_impossible_options_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        get("lserve").method(**bad)
