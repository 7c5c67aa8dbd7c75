"""AdaKV: heads compete by hand-made scores, and the sum stays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmfast.kv.entries import Entries
from mmfast.registry import get

ADA = get("adakv").method

# Beside a forced entry: one head with a single peak, one that is spread out.
SCORES = torch.tensor([[0.90, 0.03, 0.02, 0.01, 0.01, torch.inf], [0.30, 0.25, 0.20, 0.15, 0.10, torch.inf]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Of 3 + 3 free places the first head wins 1 (its peak), the second 5.
        ({"alpha": 0.0}, [2, 6]),
        ({"alpha": 1.0}, [4, 4]),
        # Half of (1, 5) and half of (3, 3).
        ({"alpha": 0.5}, [3, 5]),
        # 0.8 * (1, 5) + 0.2 * 3 = (1.4, 4.6): the larger remainder gets what is left.
        ({"alpha": 0.2}, [2, 6]),
        # 0.8 * (1, 5) + int(0.2 * 3): nobody is left with the floor, and one place is lost.
        ({"alpha": 0.2, "compat": "official"}, [2, 5]),
        # Two each first (one of them the forced one), then the four best: all in the second head.
        ({"alpha": 0.5, "floor": "minimum"}, [2, 6]),
        ({"alpha": 0.8, "floor": "minimum"}, [3, 5]),
    ],
)
def test_heads_by_hand(options: dict[str, object], expected: list[int]) -> None:
    assert ADA(keep=4, **options).head_counts(SCORES, 4).tolist() == expected


def test_weighing_by_concentration() -> None:
    scores = torch.tensor([[0.6, 0.5, 0.5, 0.4], [0.7, 0.1, 0.1, 0.1]])
    # The best two hold 1.1 of 2.0 in the first head and 0.8 of 1.0 in the second: 0.33, 0.275 ... against 0.56, 0.08.
    assert ADA(keep=2, alpha=0.0).head_counts(scores, 2).tolist() == [3, 1]
    assert ADA(keep=1, alpha=0.0).head_counts(scores, 1).tolist() == [1, 1]
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.9, 0.4, 0.0, 0.0]])
    assert ADA(keep=2, alpha=0.0).head_counts(scores, 2).tolist() == [3, 1]
    # Half of what the first head has counts, and all of the second: 0.25 four times against 0.9 and 0.4.
    assert ADA(keep=2, alpha=0.0, normalize=True).head_counts(scores, 2).tolist() == [2, 2]


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=7, max_size=7), min_size=1, max_size=5),
    st.integers(1, 7),
    st.floats(0, 1),
    st.sampled_from([{}, {"normalize": True}, {"floor": "minimum"}]),
    st.integers(0, 2),
)
def test_the_sum_is_kept(rows: list[list[int]], kept: int, alpha: float, options: dict[str, object], last: int) -> None:
    scores = torch.tensor(rows).float()
    forced = min(last, kept)
    scores[:, 7 - forced :] = torch.inf
    counts = ADA(keep=kept, alpha=alpha, **options).head_counts(scores, kept)
    assert int(counts.sum()) == kept * len(rows)
    assert bool((counts >= forced).all())
    assert bool((counts <= 7).all())


def states(length: int = 30) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, length, 8, generator=generator)
    query = 5 * torch.randn(4, length, 8, generator=generator)
    # The first group looks everywhere alike, the second always for the same.
    query[:2] *= 0.01
    query[2:] = query[2, :1]
    return keys, values, query


def test_each_head_keeps_its_best() -> None:
    entries = Entries.of(*states())
    method = ADA(keep=10, scorer="snapkv(window=3, kernel=1)")
    kept = method(entries).kept
    assert int(kept.sum()) == 20
    assert kept[:, -3:].all()
    scores = method.scores(entries, 10)
    for own, chosen in zip(scores, kept, strict=True):
        assert own[chosen].min() > own[~chosen].max()
    counts = kept.sum(dim=-1).tolist()
    assert counts[0] > 10 > counts[1]


def test_a_layer_gets_what_the_scorer_says() -> None:
    method = ADA(keep=8, scorer="pyramidkv(scorer='snapkv(window=2)')")
    keys, values, query = states(40)
    for layer, count in enumerate([14, 11, 8, 5, 2]):
        retained = method(Entries.of(keys, values, query, layer=layer, depth=5))
        assert int(retained.kept.sum()) == 2 * count


def test_scores_that_are_no_numbers_come_last() -> None:
    scores = torch.tensor([[0.5, -torch.inf, -torch.inf, torch.inf], [0.4, 0.3, 0.2, torch.inf]])
    assert ADA(keep=3, alpha=0.0).head_counts(scores, 3).tolist() == [2, 4]
    assert ADA(keep=3, alpha=0.0, normalize=True).head_counts(scores, 3).tolist() == [2, 4]


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.5},
        {"alpha": True},
        {"floor": "none"},
        {"normalize": 2},
        {"compat": "paper"},
        {"scorer": "h2o"},
        {"scorer": "adakv"},
        {"floor": "minimum", "normalize": True},
    ],
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ADA(**options)
