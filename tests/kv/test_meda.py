"""MEDA: entropies and budgets by hand, and that layers are kept and merged as LOOK-M does."""

from __future__ import annotations

import math

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.eviction.meda import Spread, attention_entropy, cross_modal_entropy
from mmfast.registry import get

MEDA = get("meda").method


def prompt(length: int = 40, text: int = 4, sharp: float = 1.0, seed: int = 0) -> Entries:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, length, 8, generator=generator)
    query = sharp * torch.randn(4, length, 8, generator=generator)
    visual = torch.ones(length, dtype=torch.bool)
    visual[:1] = False
    visual[length - text + 1 :] = False
    return Entries.of(keys, values, query, visual)


def test_entropy_is_that_of_the_whole_attention() -> None:
    entries = prompt()
    attention = entries.last_rows(40)
    expected = -(attention * attention.clamp_min(1e-12).log()).sum(dim=(1, 2)).mean() / 40
    entropy, received = attention_entropy(entries)
    assert entropy == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(received, attention.sum(dim=1).view(2, 2, -1).sum(dim=1), atol=1e-5)


def test_cross_modal_entropy_by_hand() -> None:
    # Attention to all alike: text sees three visual entries, these see two of text, later ones included.
    zeros = torch.zeros(1, 5, 2)
    visual = torch.tensor([False, True, True, True, False])
    found = cross_modal_entropy(Entries.of(zeros, zeros, zeros, visual))
    assert found == pytest.approx(math.log(3) + math.log(2), rel=1e-6)
    assert cross_modal_entropy(Entries.of(zeros, zeros, zeros)) == 0


def test_layers_share_by_the_softmax_of_their_entropies() -> None:
    method = MEDA(keep=0.4)
    assert method.ratios([math.log(3.0), 0.0], [10, 10]) == pytest.approx([0.6, 0.2])
    assert MEDA(keep=4).ratios([math.log(3.0), 0.0], [10, 20]) == pytest.approx([0.6, 0.1])
    # Bounded by the prompt and one percent of it: what the first cannot hold is lost.
    assert method.ratios([100.0, 0.0, 0.0], [10] * 3) == pytest.approx([1.0, 0.01, 0.01])


@pytest.mark.parametrize("merge", ["pivotal", "weighted", "averaged", "none"])
def test_each_layer_is_kept_and_merged_as_by_lookm(merge: str) -> None:
    layers = [prompt(sharp=0.5), prompt(sharp=4.0, seed=1)]
    method = MEDA(keep=0.5, merge=merge)
    observed = [method.observe(entries) for entries in layers]
    ratios = method.ratios([layer.entropy for layer in observed], [40, 40])
    assert ratios[0] > ratios[1]
    for entries, ratio, found in zip(layers, ratios, method.settle(observed), strict=True):
        half = method.half(ratio, 40)
        expected = get("lookm").method(keep=2 * half, recent=0.5, merge=merge)(entries)
        assert torch.equal(found.kept, expected.kept)
        assert found.counts == [max(2 * half, 3 + 1)] * 2
        for name in ("keys", "values"):
            own, theirs = getattr(found, name), getattr(expected, name)
            assert (own is None) == (theirs is None)
            if own is not None:
                assert torch.allclose(own[found.kept], theirs[found.kept], atol=1e-5)


def test_official_code_keeps_as_many_newest_as_there_is_text() -> None:
    entries = prompt(text=12)
    found = MEDA(keep=0.2, merge="pivotal", compat="official")(entries)
    # A fifth of 40, half of it the newest, would be 4; there are 12 of text.
    assert found.kept[:, -12:].all()
    plain = MEDA(keep=0.2, merge="pivotal")(entries)
    assert not plain.kept[:, -12:].all()
    assert torch.equal(MEDA(keep=0.2, merge="none", compat="official")(entries).kept, plain.kept)


def test_text_alone_stays_whole() -> None:
    zeros = torch.zeros(1, 20, 2)
    assert MEDA(keep=0.2).settle([MEDA().observe(Entries.of(zeros, zeros, zeros))]) == [None]


def test_everything_stays_where_everything_is_to_stay() -> None:
    observed = [Spread(entropy, torch.ones(2, 40), prompt()) for entropy in (1.0, 5.0)]
    assert MEDA(keep=1.0).settle(observed) == [None, None]
    assert MEDA(keep=40).settle(observed) == [None, None]


@pytest.mark.parametrize("options", [{"entropy": "some"}, {"merge": "sum"}, {"compat": "paper"}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MEDA(**options)
