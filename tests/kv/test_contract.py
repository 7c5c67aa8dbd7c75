"""The contract of methods of the cache: what holds for every one of them on every family."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

import mmfast
from mmfast.adapters import for_model
from mmfast.adapters.cache import is_logical
from support.cache_plans import METHODS, plan_of
from support.cached import LayerState, remembered
from support.cases import case_id, mixed, text_only
from support.checks import CLOSE, Generated, census, first_logits, generate, registries
from support.families import FAMILIES, Family, cast

STEPS = 4
LONG = {"llava": 16, "qwen2_5_vl": 16}
"""Families on which more steps are compared with the reference."""
DISTINCT = ["llava", "qwen2_5_vl", "gemma3", "internvl"]
"""Families that differ in what a cache can notice: positions, sliding layers, masks made outside, tiles."""


def refused(family: Family, info: mmfast.MethodInfo) -> bool:
    """Say whether a method cannot work on a family."""
    adapter = for_model(family.model())
    return bool(getattr(info.method, "compacts", False)) and not (adapter.can_compact and not adapter.slides)


PAIRS = [(family, info) for family, info in product(FAMILIES.values(), METHODS) if not refused(family, info)]
SOME = [(family, info) for family, info in PAIRS if family.name in DISTINCT]
every = pytest.mark.parametrize(("family", "info"), PAIRS, ids=case_id)
some = pytest.mark.parametrize(("family", "info"), SOME, ids=case_id)
with_keep = pytest.mark.parametrize(
    ("family", "info"), [(family, info) for family, info in SOME if "keep" in info.options], ids=case_id
)


@cache
def untouched(family: Family, rows: str, steps: int = STEPS) -> Generated:
    """Generate without a plan."""
    batch = {"mixed": mixed, "text": text_only}[rows](family)
    return generate(family.model(), batch.inputs, steps)


@every
def test_decode_steps_equal_the_reference(family: Family, info: mmfast.MethodInfo) -> None:
    """In a batch with padding: every logit, and exactly which entries of which head are stored."""
    batch, plan = mixed(family), plan_of(info)
    # Quantised codes are equal only where what is quantised is equal to the last bit: the same attention, no batch.
    packs = info.kind == "Packer"
    rows = [batch.alone(row) for row in range(len(batch))]
    model, steps = family.model("eager" if packs else "sdpa"), LONG.get(family.name, STEPS)
    with mmfast.accelerate(model, plan):
        done = [generate(model, one.inputs, steps) for one in (rows if packs else [batch])]
    before = untouched(family, "mixed", steps)
    for row, alone in enumerate(rows):
        own, place = (done[row], 0) if packs else (done[0], row)
        wanted = remembered(alone, plan, own.tokens[place, :-1].tolist())
        assert (own.logits[place] - wanted.logits).abs().max() < CLOSE
        check_entries(own, place, len(alone.ids[0]), wanted.layers)
        if batch.media[row]:
            assert (own.logits[place, 0] - before.logits[row, 0]).abs().max() < CLOSE
            assert acts(wanted, own, before, row, place, info)


def acts(wanted: Any, own: Generated, before: Generated, row: int, place: int, info: mmfast.MethodInfo) -> bool:
    """Say whether the method made a difference, so that being equal proves something."""
    if info.kind in ("Retriever", "Forgetter"):
        # Which methods read everything of a short prompt, or remember every token, is for their own tests.
        return True
    alike = int((own.tokens[place] == before.tokens[row]).int().cumprod(dim=0).sum())
    steps = slice(0, alike + 1)
    return bool((own.logits[place, steps] - before.logits[row, steps]).abs().max() > CLOSE)


def check_entries(done: Generated, row: int, length: int, wanted: dict[int, LayerState]) -> None:
    """Compare what is stored, head by head, with what the reference kept."""
    cache = done.output.past_key_values
    if not is_logical(cache):
        assert not wanted or all(bool(state.kept.all()) for state in wanted.values())
        return
    for index, state in wanted.items():
        layer = cache.layers[index]
        padding = layer.seen - length - (done.logits.shape[1] - 1)
        real = layer.real_entries()[row]
        places = layer.slots[row][None].expand(len(real), -1) if layer.places is None else layer.places[row]
        for head, kept in enumerate(state.kept):
            assert (places[head][real[head]] - padding).tolist() == kept.nonzero().squeeze(-1).tolist()


@with_keep
def test_keep_all_is_identity(family: Family, info: mmfast.MethodInfo) -> None:
    with mmfast.accelerate(family.model(), plan_of(info, 1.0)):
        during = generate(family.model(), mixed(family).inputs, STEPS)
    assert torch.equal(during.logits, untouched(family, "mixed").logits)


@some
def test_text_only_prompts_are_untouched(family: Family, info: mmfast.MethodInfo) -> None:
    with mmfast.accelerate(family.model(), plan_of(info)):
        during = generate(family.model(), text_only(family).inputs, STEPS)
    assert torch.equal(during.logits, untouched(family, "text").logits)


@some
def test_two_runs_are_equal_and_nothing_is_left_behind(family: Family, info: mmfast.MethodInfo) -> None:
    model, batch = family.model(), mixed(family)
    stock, tables = census(model), registries()
    with mmfast.accelerate(model, plan_of(info)):
        first, second = (generate(model, batch.inputs, 3) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert census(model) == stock
    assert registries() == tables
    assert torch.equal(generate(model, batch.inputs, 2).logits, untouched(family, "mixed").logits[:, :2])


@some
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_finite(family: Family, info: mmfast.MethodInfo, dtype: torch.dtype) -> None:
    model = family.model(dtype=dtype)
    with mmfast.accelerate(model, plan_of(info)):
        done = generate(model, cast(mixed(family).inputs, dtype), 3)
    assert bool(done.logits.isfinite().all())


ENTRIES = {
    "Adjuster": "adjust",
    "Retriever": "prepare",
    "Packer": "pack",
    "ModelEvictor": "settle",
    "Forgetter": "remember",
}
"""Kind of method -> what the adapters call; evictors are called themselves."""


@some
def test_an_exception_inside_a_method_leaves_nothing(
    family: Family, info: mmfast.MethodInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = family.model(), mixed(family)
    stock, tables = census(model), registries()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the method gave up")

    with mmfast.accelerate(model, plan_of(info)):
        during = census(model)
        with monkeypatch.context() as patch:
            patch.setattr(info.method, ENTRIES.get(info.kind, "__call__"), fail)
            with pytest.raises(RuntimeError, match="the method gave up"):
                generate(model, batch.inputs, 2)
        assert census(model) == during
        first_logits(model, batch.inputs)
    assert census(model) == stock
    assert registries() == tables


@some
def test_the_report_counts_every_byte(family: Family, info: mmfast.MethodInfo) -> None:
    """What is reported is what the tensors of the cache take; none of them is a part of a larger one."""
    model, batch = family.model(), mixed(family)
    with mmfast.accelerate(model, plan_of(info)) as fast, torch.no_grad():
        held = model(**batch.inputs, use_cache=True).past_key_values
        report = fast.report()
    tensors = [tensor for layer in held.layers for tensor in layer.storage()]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    assert report.kv_bytes == sum(sizes.values())
