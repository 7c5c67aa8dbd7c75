"""RazorAttention: how heads share a budget, and what one entry for many is worth."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries
from mmfast.plan import Plan
from mmfast.registry import get

RAZOR = get("razor_attention").method


def entries(total: int, heads: int = 3, layer: int = 0) -> Entries:
    drawn = torch.Generator().manual_seed(total)
    keys, values = torch.randn(2, heads, total, 4, generator=drawn)
    return Entries.of(keys, values, layer=layer, depth=4)


@pytest.mark.parametrize("retrieval", [(), ((0, 1),), ((0, 0), (0, 2)), ((0, 0), (0, 1), (0, 2)), ((1, 0),), ((0, 9),)])
@pytest.mark.parametrize("kept", [1, 2, 5, 20, 39])
def test_heads_together_keep_the_budget(retrieval: tuple[tuple[int, int], ...], kept: int) -> None:
    method = RAZOR(keep=kept, retrieval_heads=retrieval)
    found = method(entries(40))
    assert sum(found.counts) == 3 * kept
    assert found.counts == method.sizes(40, kept, 0, 3)
    seeking = [count for head, count in enumerate(found.counts) if (0, head) in retrieval]
    others = [count for head, count in enumerate(found.counts) if (0, head) not in retrieval]
    if seeking and others:
        assert min(seeking) >= max(others)
        assert max(others) - min(others) <= 1
        assert min(others) >= max(1, int(method.recent * kept))


def test_another_layer_has_its_own_heads() -> None:
    method = RAZOR(keep=10, retrieval_heads=((2, 0),))
    assert method(entries(40, layer=0)).counts == [10, 10, 10]
    assert method(entries(40, layer=2)).counts == [26, 2, 2]


def test_ends_stay_and_one_entry_stands_for_the_rest() -> None:
    prompt = entries(12, heads=1)
    found = RAZOR(keep=6, sinks=2)(prompt)
    assert found.kept[0].nonzero().squeeze(-1).tolist() == [0, 1, 2, 9, 10, 11]
    assert torch.allclose(found.keys[0, 2], prompt.keys[0, 2:9].mean(dim=0))
    assert torch.allclose(found.values[0, 2], prompt.values[0, 2:9].mean(dim=0))
    assert found.bias[0].exp()[found.kept[0]].tolist() == pytest.approx([1, 1, 7, 1, 1, 1])
    untouched = torch.tensor([0, 1, 9, 10, 11])
    assert torch.equal(found.keys[:, untouched], prompt.keys[:, untouched])


def test_nothing_is_lost_where_what_goes_is_alike() -> None:
    prompt = entries(20, heads=1)
    keys = prompt.keys.clone()
    keys[:, 4:15] = keys[:, 4:5]
    prompt = Entries.of(keys, prompt.values)
    found = RAZOR(keep=10, sinks=4)(prompt)
    query = torch.randn(4, generator=torch.Generator().manual_seed(0))
    logits = (found.keys[0] @ query + found.bias[0]).masked_fill(~found.kept[0], -torch.inf)
    full = (keys[0] @ query).softmax(dim=-1) @ prompt.values[0]
    assert torch.allclose(logits.softmax(dim=-1) @ found.values[0], full, atol=1e-6)


def test_half_precision_stays() -> None:
    prompt = entries(12)
    found = RAZOR(keep=3)(Entries.of(prompt.keys.half(), prompt.values.half()))
    assert (found.keys.dtype, found.values.dtype, found.bias.dtype) == (torch.half, torch.half, torch.float32)


def test_lists_of_plan_files_are_understood() -> None:
    data = {"method": [{"name": "razor_attention", "retrieval_heads": [[0, 1], [3, 2]]}]}
    plan = Plan.from_dict(data)
    assert plan.methods[0].retrieval_heads == ((0, 1), (3, 2))
    assert Plan.parse(plan.to_text()) == plan


@pytest.mark.parametrize("heads", [3, "no", [1, 2], [(0, -1)], [(0, 1, 2)], [(0, True)]])
def test_wrong_heads_are_refused(heads: object) -> None:
    with pytest.raises(ValueError, match="retrieval_heads="):
        RAZOR(retrieval_heads=heads)


@pytest.mark.parametrize(("field", "value"), [("sinks", -1), ("sinks", True), ("recent", 1.5), ("recent", True)])
def test_wrong_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        RAZOR(**{field: value})
