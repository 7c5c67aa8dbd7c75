"""Value merging: by hand, with heads of different size, and where few are similar enough."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries, Retained
from mmfast.registry import get

MERGING = get("kv_merging").method
INFINITY = float("inf")


def test_a_value_goes_to_the_most_similar_key() -> None:
    keys = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.6, 0.8]]])
    values = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]])
    retained = Retained(torch.tensor([True, True, False]))
    found = MERGING().adjust(Entries.of(keys, values), retained)
    # Cosine 0.8 with entry 1, whose value has a third of the norm of the dropped one.
    weight = 0.8 * 3 / 4
    assert found.values[0, 0].tolist() == [1.0, 0.0]
    assert found.values[0, 1].tolist() == pytest.approx([weight * 3 / (1 + weight), 1 / (1 + weight)], rel=1e-5)
    assert found.keys is None
    assert torch.equal(found.kept, retained.kept)


def test_opposite_keys_are_not_merged() -> None:
    keys = torch.tensor([[[1.0], [-1.0]]])
    found = MERGING().adjust(Entries.of(keys, keys), Retained(torch.tensor([True, False])))
    assert torch.equal(found.values[:, 0], keys[:, 0])


def test_heads_may_differ_in_size_and_bias_is_carried_along() -> None:
    keys, values = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[True] * 6, [True, False] * 3, [False] * 6])
    bias = torch.zeros(3, 6)
    found = MERGING().adjust(Entries.of(keys, values), Retained(kept, bias=bias))
    assert torch.equal(found.values[0], values[0])
    assert torch.equal(found.values[2], values[2])
    assert not torch.equal(found.values[1, kept[1]], values[1, kept[1]])
    assert found.bias is bias


def test_values_that_an_eviction_changed_are_what_is_merged_into() -> None:
    keys = torch.ones(1, 2, 1)
    entries = Entries.of(keys, torch.tensor([[[1.0], [4.0]]]))
    found = MERGING().adjust(entries, Retained(torch.tensor([True, False]), values=torch.tensor([[[4.0], [0.0]]])))
    assert float(found.values[0, 0]) == pytest.approx(4.0)


@pytest.mark.parametrize("compat", [None, "official"])
def test_a_share_of_the_most_similar_is_merged(compat: str | None) -> None:
    cosine = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7])
    method = MERGING(fraction=0.5, compat=compat)
    assert method.similar_enough(cosine).tolist() == [True, False, True, False, True]


def test_where_too_few_are_similar_all_of_them_are_merged() -> None:
    cosine = torch.tensor([0.1, 0.2, 0.3, 0.8, 0.9, 0.7])
    assert MERGING(threshold=0.5, fraction=0.7).similar_enough(cosine).tolist() == [False] * 3 + [True] * 3
    official = MERGING(threshold=0.5, fraction=0.7, compat="official")
    assert not bool(official.similar_enough(cosine).any())


def test_what_is_not_finite_and_does_not_count_spoils_nothing() -> None:
    keys = torch.tensor([[[1.0], [-1.0]]])
    values = torch.tensor([[[2.0], [INFINITY]]])
    found = MERGING().adjust(Entries.of(keys, values), Retained(torch.tensor([True, False])))
    assert found.values[0, 0].tolist() == [2.0]


@pytest.mark.parametrize(
    ("field", "value"), [("threshold", -0.1), ("threshold", True), ("fraction", 0.0), ("compat", "paper")]
)
def test_wrong_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        MERGING(**{field: value})
