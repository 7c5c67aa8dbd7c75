"""VL-Cache: sparsity and budgets by hand."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.eviction.vl_cache import Observed, after_vision
from mmfast.registry import get

VL = get("vl_cache").method


def test_sparsity_by_hand() -> None:
    # Two tokens after the image; the first looks at one entry alone, the second at all alike.
    keys = torch.eye(4)[None]
    query = torch.zeros(1, 4, 4)
    query[0, 2, 0] = 100.0
    visual = torch.tensor([True, True, False, False])
    sparsity, importance = after_vision(Entries.of(keys, keys, query, visual))
    # 1 + 4 of the 3 + 4 entries that the two can see.
    assert sparsity.item() == pytest.approx(2 / 7)
    assert torch.allclose(importance, torch.tensor([[1.25, 0.25, 0.25, 0.25]]))


def test_only_the_last_token_looks_where_nothing_follows_the_image() -> None:
    states = torch.zeros(1, 5, 2)
    _, importance = after_vision(Entries.of(states, states, states, torch.ones(5, dtype=torch.bool)))
    assert torch.allclose(importance, torch.full((1, 5), 0.2))


def layers(*sparsity: float, length: int = 100) -> list[Observed]:
    descending = torch.arange(length, 0, -1).float()
    return [Observed(torch.tensor(value), descending[None]) for value in sparsity]


def test_dense_layers_keep_more() -> None:
    # Denser by three: 0.75 and 0.25 of the budget of both, a tenth of it the newest.
    found = VL(keep=0.41).settle(layers(0.4, 0.8))
    assert [retained.counts for retained in found] == [[55 + 4], [18 + 4]]
    first = found[0].kept[0]
    assert first[:55].all()
    assert first[-4:].all()
    found = VL(keep=0.41, window="layer").settle(layers(0.4, 0.8))
    assert [retained.counts for retained in found] == [[61 + 6], [20 + 2]]
    found = VL(keep=0.41, per_layer=False).settle(layers(0.4, 0.8))
    assert [retained.counts for retained in found] == [[36 + 4], [36 + 4]]


def test_counts_are_shares_of_each_layer() -> None:
    # Layers may hold prompts of different length, where tokens were dropped between them.
    found = VL(keep=21).settle([*layers(0.5, length=100), *layers(0.5, length=50)])
    assert [retained.counts for retained in found] == [[18 + 2], [18 + 2]]


def test_bounds_of_a_layer() -> None:
    # All but the first are next to blind: it keeps everything, they keep one percent and the newest.
    found = VL(keep=0.5).settle(layers(0.0, 1.0, 1.0, 1.0))
    assert found[0] is None
    assert [retained.counts for retained in found[1:]] == [[1 + 5]] * 3


def test_everything_stays_where_everything_is_to_stay() -> None:
    assert VL(keep=1.0).settle(layers(0.2, 0.9)) == [None, None]
    assert VL(keep=100).settle(layers(0.2, 0.9)) == [None, None]


@pytest.mark.parametrize("options", [{"window": "none"}, {"per_head": 2}, {"per_layer": "yes"}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        VL(**options)
