"""CSP: a union of exact size, and entries that count twice."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.eviction import csp
from mmfast.kv.eviction.csp import CSP


def prompt(length: int = 40, groups: int = 2, heads: int = 4) -> Entries:
    torch.manual_seed(7)
    query, key, value = (torch.randn(count, length, 8) for count in (heads, groups, groups))
    visual = torch.zeros(length, dtype=torch.bool)
    visual[5 : length - 3] = True
    return Entries.of(key, value, query, visual)


def test_modalities_are_told_apart() -> None:
    """Two rows count, an image's and a text's; what each gives lands in one of the lists."""
    entries = Entries.of(
        torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), torch.tensor([1, 0, 1, 0]) > 0
    )
    own, other = CSP().scores(entries, 2, 2)
    # A row of three entries gives 1/4 to each, one of four 1/5: there is one more logit, zero.
    assert torch.allclose(own, torch.tensor([[1 / 4, 1 / 5]]))
    assert torch.allclose(other, torch.tensor([[1 / 5, 1 / 4]]))


@pytest.mark.parametrize("cross", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("keep", [1, 2, 11, 39])
def test_union_has_the_exact_size(cross: float, keep: int) -> None:
    for stretch in (0.5, 1.0, 2.0):
        retained = CSP(keep=keep, cross=cross, stretch=stretch)(prompt())
        assert retained is not None
        assert retained.counts == [keep, keep]
        assert retained.bias is None


def test_both_lists_stay_and_the_first_fills_up() -> None:
    method, entries = CSP(keep=21, cross=0.5), prompt()
    own, other = method.scores(entries, 10, 10)
    by_own, by_other = method.lists(own, other, 11)
    assert by_own.sum(dim=-1).tolist() == by_other.sum(dim=-1).tolist() == [5, 5]
    retained = method(entries)
    assert retained is not None
    chosen = retained.kept[:, :30]
    assert not ((by_own | by_other) & ~chosen).any()
    extra = chosen & ~(by_own | by_other)
    for head in range(2):
        assert extra[head].any()
        assert own[head][extra[head]].min() >= own[head][~chosen[head]].max()


def test_official_copies_count_twice_in_the_attention() -> None:
    """With everything equal in both lists each entry they choose is a copy."""
    method, entries = CSP(keep=20, cross=0.5, compat="official"), prompt()
    retained = method(entries)
    assert retained is not None
    assert retained.bias is not None
    by_own, by_other = method.lists(*method.scores(entries, 10, 10), 10)
    assert (by_own & by_other).any()
    assert retained.counts == [20, 20]
    query = torch.randn(2, 8)
    for head in range(2):
        twice = torch.cat([by_own[head].nonzero(), by_other[head].nonzero(), torch.arange(30, 40)[:, None]]).squeeze(-1)
        keys, values = entries.keys[head], entries.values[head]
        official = (keys[twice] @ query[head]).softmax(dim=0) @ values[twice]
        own = retained.kept[head]
        logits = keys[own] @ query[head] + retained.bias[head, own]
        assert torch.allclose(logits.softmax(dim=0) @ values[own], official, atol=1e-5)


def test_blocks_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CSP().scores(prompt(), 9, 5)
    monkeypatch.setattr(csp, "_LOGITS", 400)
    for one, other in zip(whole, CSP().scores(prompt(), 9, 5), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("options", [{"cross": -0.1}, {"recent": 2}, {"stretch": 0}, {"compat": "paper"}])
def test_refuses(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        CSP(**options)  # type: ignore[arg-type]
