"""AirCache: the elite, what it judges and the shares of the layers, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.eviction.aircache import Judged, skewness
from mmfast.registry import get

AIR = get("aircache").method


def prompt(logits: list[float], visual: list[bool], others: float = 0.0) -> Entries:
    """One head in which the last token has these logits, and all others ``others`` to each entry."""
    length = len(logits)
    keys = torch.eye(length)[None]
    query = torch.full((1, length, length), others)
    query[0, -1] = torch.tensor(logits)
    return Entries.of(keys, keys, query * length**0.5, torch.tensor(visual))


KINDS = [False, True, True, False, False, False]


def test_elite_by_hand() -> None:
    # The first token has by far the most attention, but comes before the image.
    entries = prompt([9.0, 9.0, 0.0, math.log(2.0), math.log(1.9), 0.0], KINDS)
    assert AIR(alpha=0.9).elite(entries).tolist() == [False, False, False, True, True, True]
    assert AIR(alpha=0.96).elite(entries).tolist() == [False, False, False, True, False, True]
    assert AIR(alpha=0.0).elite(entries).tolist() == [False, False, False, True, True, True]


def test_the_last_token_alone_judges_where_no_text_follows() -> None:
    entries = prompt([0.0, 1.0, 0.0, 0.0], [False, False, True, True])
    assert AIR().elite(entries).tolist() == [False, False, False, True]
    # It sees both visual entries, itself among them, and nothing else.
    assert AIR().observe(entries).importance.tolist() == [0.5, 0.5]


def test_importance_by_hand() -> None:
    entries = prompt([9.0, math.log(4.0), 0.0, 0.0, 0.0, 0.0], KINDS)
    elite = torch.tensor([False, False, False, True, False, True])
    # The fourth token sees two visual entries and itself alike; the last also the fourth, and the first image
    # entry four times as much: 4 and 1 of 7.
    expected = torch.tensor([(1 / 3 + 4 / 7) / 2, (1 / 3 + 1 / 7) / 2])
    assert torch.allclose(AIR().importance(entries, elite), expected, atol=1e-6)


def test_skewness_is_the_adjusted_one() -> None:
    # Mean 1, deviations -1, -1, -1, 3; sample variance 4; third powers -3 + 27 = 24 over 8; times 4 / (3 * 2).
    assert skewness(torch.tensor([0.0, 0.0, 0.0, 4.0])) == pytest.approx(24 / 8 * 4 / 6)
    assert skewness(torch.tensor([4.0, 4.0, 4.0, 0.0])) == 0.001
    assert skewness(torch.full((5,), 0.3)) == 0.001


def layer(values: list[float]) -> Judged:
    visual = torch.zeros(len(values) + 2, dtype=torch.bool)
    visual[1:-1] = True
    return Judged(visual, torch.tensor(values, dtype=torch.float64))


def test_layers_share_by_strength_and_skewness() -> None:
    # Equally skewed, one three times as strong: (3/2 + 1) / 2 and (1/2 + 1) / 2 of a half of 8.
    strong, weak = layer([3.0, *[0.0] * 7]), layer([1.0, *[0.0] * 7])
    method = AIR(keep=0.5)
    assert method.ratios([strong.importance, weak.importance]) == pytest.approx([0.625, 0.375])
    found = method.settle([strong, weak])
    assert [retained.counts for retained in found] == [[5 + 2], [3 + 2]]
    # Of equal scores the first stay, and text always.
    assert found[1].kept.tolist() == [True] * 4 + [False] * 5 + [True]
    assert AIR(keep=4).ratios([strong.importance, weak.importance]) == pytest.approx([0.625, 0.375])


def test_layers_without_visual_entries_are_left_alone() -> None:
    blind = Judged(torch.zeros(4, dtype=torch.bool), torch.zeros(0, dtype=torch.float64))
    found = AIR(keep=0.5).settle([blind, layer([3.0, *[0.0] * 7])])
    assert found[0] is None
    assert found[1].counts == [4 + 2]
    assert AIR(keep=0.5).settle([blind, blind]) == [None, None]


def test_layers_that_see_nothing_share_alike() -> None:
    assert AIR(keep=0.5).ratios([torch.zeros(4), torch.zeros(4)]) == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize("alpha", [-0.1, 1.1, True, "high"])
def test_impossible_options_are_refused(alpha: object) -> None:
    with pytest.raises(ValueError, match="alpha"):
        AIR(alpha=alpha)
