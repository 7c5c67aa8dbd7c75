"""Quest, and what all methods share that read a part of the prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmfast.kv.base import Retriever
from mmfast.kv.entries import Entries, Step
from mmfast.registry import get
from mmfast.token_pruning.attention import AttentionView
from support.entries import rotary

EXACT = ("token_select", "sentence_kv", "double_sparsity", "vasparse")
AT_MOST = ("shadowkv", "actqkv", "lserve")
CALIBRATED = ("squeezed_attention", "rekv", "quest")
"""What they read depends on whole clusters, frames or pages, and may exceed a small budget."""


def random_prompt(length: int, groups: int = 2, heads: int = 4, later: int = 6) -> tuple[Entries, Tensor, Tensor]:
    """Return a prompt with text, an image and a video, and queries and keys that go on after it."""
    generator = torch.Generator().manual_seed(length)
    keys = torch.randn(groups, length + later, 16, generator=generator)
    query = torch.randn(heads, length + later, 16, generator=generator)
    places = torch.arange(length)
    visual = (places >= length // 4) & (places < 3 * length // 4)
    media = torch.where(visual, (places >= length // 2).long(), -1)
    frame = torch.where(media == 1, (places - length // 2) // 3, media)
    entries = Entries.of(
        keys[:, :length],
        keys[:, :length],
        visual=visual,
        media=media,
        frame=frame,
        attention=AttentionView(query[:, :length], keys[:, :length]),
        rotation=rotary(length, 16, 1e4),
        layer=2,
        depth=4,
    )
    return entries, keys, query


def decode(method: Retriever, entries: Entries, keys: Tensor, query: Tensor, steps: int) -> list[Tensor | None]:
    """Prepare, and let the method choose in a few steps."""
    method.prepare(entries)
    chosen = []
    for added in range(1, steps + 1):
        length = len(entries) + added
        stored = keys[:, :length]
        step = Step(stored, stored, query[:, length - 1 : length], seen=length, added=added, layer=2, depth=4)
        chosen.append(method.choose(replace(step, memory=entries.memory)))
    return chosen


@pytest.mark.parametrize("name", [*EXACT, *AT_MOST, *CALIBRATED])
@pytest.mark.parametrize("length", [8, 33, 150])
@pytest.mark.parametrize(("groups", "heads"), [(1, 3), (2, 4), (3, 3)])
def test_a_step_reads_its_budget_of_the_prompt_and_all_that_follows(
    name: str, length: int, groups: int, heads: int
) -> None:
    for keep in sorted({1, 2, length // 4, length // 2, length - 1}):
        method = get(name).method(keep=keep)
        for added, mask in enumerate(decode(method, *random_prompt(length, groups, heads), steps=6), start=1):
            if name == "sentence_kv" and added == 1:
                assert mask is None
                continue
            assert mask is not None
            assert mask.shape[-1] == length + added
            assert mask[..., length:].all()
            read = mask[..., :length].sum(dim=-1)
            assert name not in EXACT or (read == keep).all()
            assert name not in AT_MOST or (read <= keep).all()
            assert (read >= 1).all()


@pytest.mark.parametrize("name", [*EXACT, *AT_MOST, *CALIBRATED])
def test_everything_is_read_in_dense_layers_and_where_the_prompt_fits(name: str) -> None:
    for method in (get(name).method(keep=5, dense_layers=3), get(name).method(keep=1.0), get(name).method(keep=40)):
        assert decode(method, *random_prompt(40), steps=3) == [None] * 3


@pytest.mark.parametrize("name", [*EXACT, *AT_MOST, *CALIBRATED])
def test_steps_repeat_and_survive_what_is_not_finite(name: str) -> None:
    masks = []
    for _ in range(2):
        entries, keys, query = random_prompt(40)
        keys[:, 3], keys[:, 30] = torch.nan, torch.inf
        masks.append(decode(get(name).method(keep=10), entries, keys, query, steps=4))
    for first, second in zip(*masks, strict=True):
        assert (first is None and second is None) or torch.equal(first, second)


def test_pages_are_ranked_by_what_their_keys_could_give() -> None:
    # Page 1 holds the largest value of either channel, though no single key holds both.
    keys = torch.tensor([[[2.0, 2.0], [2.0, 2.0], [3.0, 0.0], [0.0, 3.0], [1.0, 1.0], [-9.0, -9.0]]])
    method = get("quest").method(keep=2, page_size=2, min_pages=1, dense_layers=0)
    entries = Entries.of(keys, keys)
    method.prepare(entries)
    stored = torch.cat([keys, keys[:, :1]], dim=1)
    up = method.choose(Step(stored, stored, torch.ones(1, 1, 2), seen=7, memory=entries.memory))
    assert up.tolist() == [[False, False, True, True, False, False, True]]
    down = method.choose(Step(stored, stored, -torch.ones(1, 1, 2), seen=7, memory=entries.memory))
    assert down.tolist() == [[False, False, False, False, True, True, True]]


def test_heads_of_a_group_share_the_page_that_any_of_them_wants_most() -> None:
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.6]]])
    method = get("quest").method(keep=1, page_size=1, min_pages=1, dense_layers=0)
    entries = Entries.of(keys, keys)
    method.prepare(entries)
    query = torch.tensor([[[1.0, 0.0]], [[0.0, 5.0]]])
    chosen = method.choose(Step(keys, keys, query, seen=3, added=0, memory=entries.memory))
    assert chosen.tolist() == [[False, True, False]]


def test_three_pages_are_read_however_small_the_budget() -> None:
    entries, keys, query = random_prompt(150)
    mask = decode(get("quest").method(keep=1), entries, keys, query, steps=1)[0]
    assert mask is not None
    # 150 = 9 pages of 16 and one of 6.
    assert set(mask[:, :150].sum(dim=-1).tolist()) <= {48, 38}


@pytest.mark.parametrize("options", [{"page_size": 0}, {"min_pages": 1.5}, {"keep": 0}, {"dense_layers": -1}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        get("quest").method(**options)
