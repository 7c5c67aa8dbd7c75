"""Rows of a cache that keep different tokens of a common block."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.adapters.cache import LogicalLayer
from mmfast.kv.cache import Announcement


def append(layer: LogicalLayer, tags: torch.Tensor, valid: torch.Tensor | None) -> None:
    """Store entries whose keys are the tags ``[B, q]``."""
    batch, query = tags.shape
    layer.announced = Announcement(query, valid, torch.arange(query).expand(batch, query))
    states = tags.float()[:, None, :, None].expand(-1, 2, -1, 3)
    layer.update(states, -states)


def held(layer: LogicalLayer) -> list[list[int]]:
    """Return the tags of each row, in order."""
    real = layer.real_entries()[:, 0]
    assert torch.equal(layer.keys, -layer.values)
    return [row[own].long().tolist() for row, own in zip(layer.keys[:, 0, :, 0], real, strict=True)]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_each_row_holds_what_it_accepted(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    pads = data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    layer = LogicalLayer()
    width, tag = 4, 4
    valid = torch.arange(width) >= torch.tensor(pads)[:, None]
    append(layer, torch.arange(width).expand(rows, -1), valid)
    expected = [list(range(pad, width)) for pad in pads]
    seen = width
    for _ in range(data.draw(st.integers(1, 4))):
        query = data.draw(st.integers(1, 5))
        append(layer, torch.arange(tag, tag + query).expand(rows, -1), None)
        paths = [sorted(data.draw(st.sets(st.integers(0, query - 1), max_size=query))) for _ in range(rows)]
        longest = max(1, *(len(path) for path in paths)) if rows > 1 else max(1, len(paths[0]))
        places, real = torch.zeros(rows, longest, dtype=torch.int64), torch.zeros(rows, longest, dtype=torch.bool)
        for row, path in enumerate(paths):
            places[row, : len(path)] = torch.tensor(path, dtype=torch.int64)
            real[row, : len(path)] = True
            expected[row] += [tag + place for place in path]
        layer.keep_block(query, places, None if bool(real.all()) else real)
        tag, seen = tag + query, seen + longest
        assert held(layer) == expected
        assert layer.get_seq_length() == seen
        if data.draw(st.booleans()) and all(expected):
            layer.compact(layer.real_entries())
            assert held(layer) == expected
            assert layer.stored == max(map(len, expected))


def test_a_block_that_stays_whole_is_not_touched() -> None:
    layer = LogicalLayer()
    append(layer, torch.arange(3)[None], None)
    before = layer.keys
    layer.keep_block(2, torch.tensor([[0, 1]]), None)
    assert layer.keys is before
    layer.keep_block(2, torch.tensor([[0]]), None)
    assert held(layer) == [[0, 1]]
    assert layer.valid is None
