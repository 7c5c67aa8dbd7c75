"""Masks and indices of shortened sequences, against what is written out in full."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.adapters.cache import LogicalLayer
from mmfast.adapters.call import Level
from mmfast.adapters.masks import (
    causal,
    decoder_mask,
    gather_positions,
    gather_prepared,
    gather_rows,
    gather_table,
    hide,
    layer_mask,
    pack,
)
from mmfast.kv.cache import Announcement

CPU = torch.device("cpu")
choices = st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4)


def choice(rows: list[list[bool]]) -> Tensor:
    """Every row keeps its last token: a prompt always ends in text."""
    return torch.tensor([[*row, True] for row in rows])


@given(rows=choices)
@settings(max_examples=80, deadline=None)
def test_packing_keeps_each_row_in_order(rows: list[list[bool]]) -> None:
    keep = choice(rows)
    indices, real = pack(keep)
    assert indices.shape == (len(rows), int(keep.sum(dim=1).max()))
    for row, own in enumerate(keep):
        mine = indices[row] if real is None else indices[row, real[row]]
        assert mine.tolist() == own.nonzero().squeeze(-1).tolist()
        if real is not None:
            # Padding stands on the left and points at what was dropped.
            assert real[row].tolist() == sorted(real[row].tolist())
            assert not own[indices[row, ~real[row]]].any()
    assert (real is None) == (len(keep.sum(dim=1).unique()) == 1)


@given(rows=choices, seed=st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_stretching_gives_each_place_its_nearest_survivor(rows: list[list[bool]], seed: int) -> None:
    keep = choice(rows)
    indices, real = pack(keep)
    level = Level(indices, real)
    states = torch.randn(*indices.shape, 3, generator=torch.Generator().manual_seed(seed))
    full = level.stretch(states, keep.shape[1])
    assert full.shape == (len(rows), keep.shape[1], 3)
    for row, own in enumerate(keep):
        kept = own.nonzero().squeeze(-1)
        mine = states[row] if real is None else states[row, real[row]]
        for place in range(int(kept[0]), keep.shape[1]):
            assert torch.equal(full[row, place], mine[int((kept <= place).sum()) - 1])


@given(first=choices, seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_narrowing_twice_is_narrowing_once(first: list[list[bool]], seed: int) -> None:
    keep = choice(first)
    level = Level(*pack(keep))
    again = torch.rand(level.slots.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    again[:, -1] = True
    again = again if level.real is None else again & level.real
    narrower, step = level.narrow(again)
    assert torch.equal(level.slots.gather(1, step), narrower.slots)
    final = torch.zeros_like(keep)
    for row in range(len(keep)):
        final[row, level.slots[row, again[row]]] = True
    direct, real = pack(final)
    for row in range(len(keep)):
        mine = narrower.slots[row] if narrower.real is None else narrower.slots[row, narrower.real[row]]
        assert mine.tolist() == (direct[row] if real is None else direct[row, real[row]]).tolist()
    assert narrower.counts() == final.sum(dim=1).tolist()


@pytest.mark.parametrize("shared", [False, True], ids=["own-values", "shared-values"])
@pytest.mark.parametrize("rows", [1, 3])
def test_gathering_rows_and_positions(rows: int, shared: bool) -> None:
    indices = torch.tensor([[0, 2, 5], [1, 2, 3], [3, 4, 5]])[:rows]
    values = torch.arange(6 * (1 if shared else rows) * 2.0).view(1 if shared else rows, 6, 2)
    gathered = gather_rows(values, indices)
    assert torch.equal(gathered, torch.stack([values[0 if shared else row, own] for row, own in enumerate(indices)]))
    positions = torch.arange(6 * (1 if shared else rows)).view(1 if shared else rows, 6)
    wanted = torch.stack([positions[0 if shared else row, own] for row, own in enumerate(indices)])
    assert torch.equal(gather_positions(positions, indices), wanted)
    three = torch.stack([positions, positions + 100, positions + 200])
    assert torch.equal(gather_positions(three, indices), torch.stack([wanted, wanted + 100, wanted + 200]))
    assert torch.equal(gather_table(values, indices), gathered)
    wide = torch.stack([values, values + 100, values + 200])
    assert torch.equal(gather_table(wide, indices), torch.stack([gathered, gathered + 100, gathered + 200]))


def pruned_cache() -> LogicalLayer:
    """Six logical tokens: the first row stores 1, 2, 5, the second 4, 5 behind a padding slot."""
    layer = LogicalLayer()
    layer.announced = Announcement(
        6, torch.tensor([[True, True, True], [False, True, True]]), torch.tensor([[1, 2, 5], [0, 4, 5]])
    )
    layer.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    return layer


def test_the_decoder_sees_stored_tokens_right_aligned() -> None:
    mask = decoder_mask(pruned_cache(), 2, 2, torch.tensor([[True, True], [False, True]]), CPU)
    assert mask.int().tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0, 1]]
    assert decoder_mask(None, 2, 3, None, CPU).tolist() == [[True] * 3] * 2


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_prepared_masks_are_cut_in_rows_and_columns(additive: bool) -> None:
    past, length = 2, 5
    visible = torch.rand(2, 1, length, past + length, generator=torch.Generator().manual_seed(0)) < 0.6
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min) if additive else visible
    indices = torch.tensor([[0, 2, 4], [1, 3, 4]])
    real = torch.tensor([[True, True, True], [False, True, True]])
    cut = gather_prepared({"full": mask, "none": None}, indices, real)
    found = cut["full"] == 0 if additive else cut["full"]
    for row, own in enumerate(indices):
        wanted = visible[row, 0][own][:, [0, 1, *(own + past)]]
        wanted[:, past:] &= real[row]
        assert torch.equal(found[row, 0], wanted)
    assert torch.equal(cut["none"], causal(3, CPU) & real[:, None, None])
    assert gather_prepared(None, indices, None) is None


def test_hiding() -> None:
    hidden = torch.tensor([True, False])
    assert hide(torch.tensor([True, True]), hidden).tolist() == [False, True]
    assert hide(torch.tensor([0.0, 0.0]), hidden).tolist() == [torch.finfo(torch.float32).min, 0.0]


def expected_layer_mask(window: int | None, entry: Tensor, real: Tensor, slots: Tensor) -> Tensor:
    """Each token sees the real tokens at or before it, as far as the window reaches."""
    cache, rows = pruned_cache(), []
    for row in range(2):
        keys = torch.cat([cache.slots[row], slots[row]])
        present = torch.cat([cache.valid[row], real[row]])
        order = torch.cat([torch.full((3,), -1), entry[row]])
        visible = present & (order <= entry[row][:, None])
        if window is not None:
            visible &= keys > slots[row][:, None] - window
        rows.append(visible)
    return torch.stack(rows)[:, None]


@pytest.mark.parametrize("window", [None, 3, 5])
@pytest.mark.parametrize("form", ["none", "bool", "additive"])
def test_the_mask_of_a_layer_with_tokens_of_its_own(window: int | None, form: str) -> None:
    entry, real = torch.tensor([[0, 2, 3], [1, 2, 3]]), torch.tensor([[True, True, True], [False, True, True]])
    slots = entry + 6
    made = {
        "none": None,
        # The decoder believes in five stored tokens, of which this layer has its own opinion.
        "bool": torch.cat([torch.ones(2, 1, 4, 5, dtype=torch.bool), causal(4, CPU).expand(2, -1, -1, -1)], dim=-1),
    }
    made["additive"] = torch.zeros(2, 1, 4, 9).masked_fill(~made["bool"], torch.finfo(torch.float32).min)
    found = layer_mask(
        made[form],
        entry=entry,
        real=real,
        own=4,
        batch=2,
        query=3,
        device=CPU,
        layer=pruned_cache(),
        query_slots=slots,
        window=window,
    )
    assert found is not None
    visible = found == 0 if form == "additive" else found
    assert torch.equal(visible, expected_layer_mask(window, entry, real, slots))


def test_a_two_dimensional_mask_stays_one() -> None:
    entry, real = torch.tensor([[0, 2], [2, 3]]), torch.tensor([[True, True], [False, True]])
    found = layer_mask(
        torch.ones(2, 9, dtype=torch.int64),
        entry=entry,
        real=real,
        own=4,
        batch=2,
        query=2,
        device=CPU,
        layer=pruned_cache(),
        query_slots=entry + 6,
        window=None,
    )
    assert found.int().tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]]


def test_no_mask_where_causality_says_it_all() -> None:
    nothing = {"entry": None, "real": None, "batch": 1, "device": CPU, "query_slots": None, "window": None}
    assert layer_mask(None, own=4, query=4, layer=None, **nothing) is None
    layer = LogicalLayer()
    layer.announced = Announcement(6, None, torch.tensor([[1, 2, 5]]))
    layer.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))
    assert layer_mask(None, own=1, query=1, layer=layer, **nothing) is None
    assert layer_mask(None, own=2, query=2, layer=layer, **nothing).int().tolist() == [
        [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]
    ]
