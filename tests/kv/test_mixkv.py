"""MixKV: the three mixtures of a small prompt, by hand."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.eviction.mixkv import key_similarity, matched
from mmfast.registry import get


def prompt() -> Entries:
    """Three entries before a window of one: the third has a key of its own, the second a large value."""
    keys = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]])
    values = torch.tensor([[[1.0, 0.0], [5.0, 0.0], [0.0, 3.0], [9.0, 0.0]]])
    return Entries.of(keys, values, torch.zeros(1, 4, 2))


@pytest.mark.parametrize("mix", ["headwise", "equal", "value_norm"])
def test_mixtures_by_hand(mix: str) -> None:
    # The window looks at all four alike: 1/4 each. Sizes 1, 5, 3 spread to 0, 1, 1/2 and scale to 0, 1/2, 1/4.
    attention, size = torch.full((3,), 0.25), torch.tensor([0.0, 0.5, 0.25])
    # Cosines to the mean key (3/4, 1/4) spread, reversed, to 0, 0, 1, and scale to 0, 0, 3/4.
    rarity = torch.tensor([0.0, 0.0, 0.75])
    # Three of the six pairs of keys are alike, the others at right angles.
    weight = 0.5
    expected = {
        "headwise": weight * rarity + (1 - weight) * (attention + size),
        "equal": (attention + size + rarity) / 3,
        "value_norm": attention + size,
    }[mix]
    scores = get("mixkv").method(keep=2, window=1, kernel=1, mix=mix).score(prompt(), 2)
    assert torch.allclose(scores[0, :3], expected, atol=1e-6)
    assert scores[0, 3] == torch.inf


def test_redundancy_is_the_mean_cosine_of_two_keys() -> None:
    keys = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    similarity, redundancy = key_similarity(keys)
    unit = torch.nn.functional.normalize(keys, dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    pairs = ~torch.eye(9, dtype=torch.bool)
    assert torch.allclose(redundancy, cosines[:, pairs].mean(dim=-1), atol=1e-6)
    assert torch.allclose(similarity, cosines.mean(dim=-1), atol=1e-6)


def test_what_is_all_alike_adds_nothing() -> None:
    assert matched(torch.ones(1, 4), torch.rand(1, 4)).tolist() == [[0.0] * 4]


def test_other_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match="mix='sum'"):
        get("mixkv").method(mix="sum")
