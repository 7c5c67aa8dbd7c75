"""LOOK-M: who stays where text has priority and where not, and how much merging may change."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.kv.eviction import lookm
from mmfast.kv.eviction.lookm import LookM, most_similar
from mmfast.token_pruning.attention import AttentionView


def prompt(length: int = 40, groups: int = 2, heads: int = 4) -> Entries:
    """Three tokens of text, an image up to the sixth token from the end, text."""
    torch.manual_seed(5)
    query, key, value = (torch.randn(count, length, 8) for count in (heads, groups, groups))
    visual = torch.zeros(length, dtype=torch.bool)
    visual[3 : length - 6] = True
    return Entries.of(key, value, query, visual)


def test_query_heads_are_added_up() -> None:
    entries = prompt()
    sums = AttentionView(entries.view.query, entries.keys).column_sums(torch.ones(40), heads="each")
    assert torch.allclose(LookM().scores(entries), sums.view(2, 2, -1).sum(dim=1))


def test_text_stays_and_the_rest_of_the_budget_goes_to_the_image() -> None:
    entries = prompt()
    retained = LookM(keep=20)(entries)
    assert retained is not None
    assert retained.counts == [20, 20]
    assert retained.kept[:, ~entries.visual].all()
    assert retained.kept[:, 30:].all()


def test_more_text_than_budget_leaves_no_image() -> None:
    entries = prompt()
    retained = LookM(keep=6)(entries)
    assert retained is not None
    assert torch.equal(retained.kept, (~entries.visual).expand(2, -1))


def test_without_prior_the_first_entries_stay() -> None:
    for keep in (1, 3, 8, 39):
        retained = LookM(keep=keep, text_prior=False)(prompt())
        assert retained is not None
        assert retained.counts == [keep, keep]
        recent = round(0.5 * keep)
        assert retained.kept[:, 40 - recent :].all()
        assert retained.kept[:, : min(4, keep - recent)].all()


def test_prompt_of_text_alone_stays_whole() -> None:
    entries = prompt()
    text = Entries.of(entries.keys, entries.values, entries.view.query)
    retained = LookM(keep=5)(text)
    assert retained is not None
    assert retained.kept.all()
    assert retained.keys is None


@pytest.mark.parametrize("merge", ["pivotal", "weighted", "averaged"])
def test_merging_equal_entries_changes_nothing(merge: str) -> None:
    entries = prompt()
    same = Entries.of(torch.ones(2, 40, 8), torch.full((2, 40, 8), 3.0), entries.view.query, entries.visual)
    retained = LookM(keep=20, merge=merge)(same)  # type: ignore[arg-type]
    assert retained is not None
    assert retained.keys is not None
    assert retained.values is not None
    assert torch.allclose(retained.keys, same.keys)
    assert torch.allclose(retained.values, same.values)


def test_dropping_alone_changes_nothing() -> None:
    retained = LookM(keep=20, merge="none")(prompt())
    assert retained is not None
    assert retained.keys is None
    assert retained.values is None


def test_what_is_sent_arrives() -> None:
    """One entry goes; with its partner it makes (c + (x + c) / 2) / 2."""
    keys = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 4.0]]])
    mask = torch.tensor([[True, True, False]])
    merged, _ = LookM().merged(keys, keys, mask)
    assert merged[0, :2].tolist() == [[1.0, 0.0], [0.0, 2.5]]
    averaged, _ = LookM(merge="averaged").merged(keys, keys, mask)
    assert averaged[0, :2].tolist() == [[1.0, 0.0], [0.0, 3.0]]


def test_blocks_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    places = torch.randperm(40, generator=torch.Generator().manual_seed(0)).expand(2, -1)
    whole = most_similar(keys, places[:, :10], places[:, 10:])
    monkeypatch.setattr(lookm, "_COSINES", 50)
    parts = most_similar(keys, places[:, :10], places[:, 10:])
    assert torch.allclose(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("options", [{"merge": "mean"}, {"recent": 2}, {"text_prior": 3}, {"compat": "paper"}])
def test_refuses(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LookM(**options)  # type: ignore[arg-type]
