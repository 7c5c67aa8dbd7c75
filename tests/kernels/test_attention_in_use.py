"""Models attend through kernels wherever a plan lets them, and give what they give without."""

from __future__ import annotations

import logging
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast.adapters import for_model
from mmfast.kernels import dispatch
from mmfast.kv.retrieval.vasparse import visual_saliency
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.in_llm.mustdrop import text_attention
from support.cases import mixed, one
from support.checks import CLOSE, generate, registries
from support.drafters import registered
from support.families import FAMILIES, Family
from support.flash import FLASH, flash_on_cpu
from support.in_use import Calls, compare, generated

pytestmark = pytest.mark.interpreter

SEVERAL = ["llava", "qwen2_5_vl", "gemma3"]
"""Families that differ in positions, and in layers that slide."""
QUEST = "quest(keep=0.4, dense_layers=0, page_size=2)"
DECODING = {
    QUEST: "gather_decode",
    "adakv(keep=0.4)": "gather_decode",
    "razor_attention(keep=0.4)": "gather_decode",
    "int8(residual=2)": "quant_decode",
    "kivi(bits=4, group=8, residual=8)": "quant_decode",
    "adakv(keep=0.4) + int8(residual=2)": "quant_decode",
}
FAST = {("llava", QUEST), ("qwen2_5_vl", "adakv(keep=0.4)"), ("gemma3", "int8(residual=2)")}
"""One of each, and of each family; interpreted, all of them take minutes."""


def slow_unless(fast: bool) -> list[Any]:
    return [] if fast else [pytest.mark.slow]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def full_layers(family: Family) -> int:
    """Count the layers that do not slide."""
    adapter = for_model(family.model())
    kinds = getattr(adapter.text_config, "layer_types", None) or ["full_attention"] * adapter.shape.layers
    return kinds.count("full_attention")


@pytest.mark.parametrize(
    ("name", "plan"),
    [pytest.param(*pair, marks=slow_unless(pair in FAST)) for pair in product(SEVERAL, DECODING)],
)
def test_decode_steps(name: str, plan: str, calls: Calls) -> None:
    """Three prompts of different lengths, padded on the left, with grouped heads."""
    family, tables = FAMILIES[name], registries()
    compare(mixed(family), plan, calls, 2)
    assert calls.used() == {DECODING[plan]}
    if plan == QUEST:
        assert calls["gather_decode"] == full_layers(family)
    if "int8" in plan:
        assert calls["quant_decode"] == 3 * full_layers(family)
    assert registries() == tables


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["adakv(keep=0.4)", QUEST, "aki_mma()", "saisa()"])
def test_with_eager_attention(plan: str, calls: Calls) -> None:
    compare(mixed(FAMILIES["llava"]), plan, calls, 2, "eager")
    assert calls.used()


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        pytest.param(*pair, marks=slow_unless(pair in {("qwen2_5_vl", ""), ("gemma3", "adakv(keep=0.4)")}))
        for pair in product(SEVERAL, ["", "adakv(keep=0.4)", "int8(residual=8)"])
    ],
)
def test_trees_of_drafted_tokens(name: str, beside: str, calls: Calls) -> None:
    """Rows accept different numbers of tokens, so that what they store has holes."""
    family = FAMILIES[name]
    batch = mixed(family)
    with mmfast.kernels.use("torch"):
        off = generated(batch, beside, 6) if beside else generate(family.model(), batch.inputs, 6)
    # What is right differs from row to row.
    known = [row[: 2 + 2 * place] + [0] * (4 - 2 * place) for place, row in enumerate(off.tokens.tolist())]
    with registered(known):
        plan = 'oracle(num_draft=3, shape="tree", adaptive_length=False)'
        on = generated(batch, f"{beside} + {plan}" if beside else plan, 6)
    assert torch.equal(on.tokens, off.tokens)
    assert (on.logits - off.logits).abs().max() < CLOSE
    assert calls["tree_attention"] > 0


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param(*pair, marks=slow_unless(pair in {("qwen2_5_vl", "aki_mma()"), ("llava", "saisa()")}))
        for pair in product(["llava", "qwen2_5_vl"], ["aki_mma()", "saisa()", "random(keep=0.5) + aki_mma()"])
    ],
)
def test_masks_of_rectangles(name: str, plan: str, calls: Calls) -> None:
    family = FAMILIES[name]
    compare(mixed(family), plan, calls, 2)
    assert calls.used() == {"masked_rect"}
    assert calls["masked_rect"] == for_model(family.model()).shape.layers


@pytest.mark.parametrize("plan", ["aki_mma()", "saisa()"])
def test_families_that_make_masks_keep_them(plan: str, calls: Calls) -> None:
    compare(mixed(FAMILIES["gemma3"]), plan, calls, 2)
    assert not calls.used()


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["aki_mma()", "saisa()"])
def test_who_reads_attention_gets_a_mask(plan: str, calls: Calls) -> None:
    compare(mixed(FAMILIES["llava"]), f"{plan} + snapkv(keep=0.4, window=4)", calls, 3)
    assert not calls.used()


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["random(keep=0.5) + aki_mma()", "saisa()"])
def test_a_second_image_behind_a_shortened_prompt(plan: str, calls: Calls) -> None:
    family, found = FAMILIES["llava"], []
    model = family.model()
    first, second = (family.batch([3, family.image(0, 1), 4], [6, family.image(0, 2), 7]) for _ in range(2))
    mask = torch.cat([first.inputs["attention_mask"], torch.ones_like(second.inputs["input_ids"])], dim=1)
    for backend in ("torch", "triton"):
        with mmfast.accelerate(model, plan), mmfast.kernels.use(backend), torch.no_grad():
            cache = model(**first.inputs, use_cache=True).past_key_values
            assert bool(calls.used()) is (backend == "triton")
            inputs = {**second.inputs, "attention_mask": mask, "past_key_values": cache}
            found.append(model(**inputs).logits[:, -1])
    assert calls["masked_rect"] == 2 * for_model(model).shape.layers
    assert (found[0] - found[1]).abs().max() < CLOSE


@pytest.mark.slow
def test_what_drops_inside_works_on_masks(calls: Calls) -> None:
    compare(mixed(FAMILIES["llava"]), "aki_mma() + fastv(layer=2, keep=0.5)", calls, 2)
    assert not calls.used()


@pytest.mark.slow
def test_gradients_pass_the_rectangles(calls: Calls) -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), one(family)
    weight = model.get_decoder().layers[1].self_attn.k_proj.weight
    found = []
    for backend in ("torch", "triton"):
        with mmfast.accelerate(model, "aki_mma()"), mmfast.kernels.use(backend):
            loss = model(**batch.inputs, use_cache=False).logits.float().square().mean()
            found.append(torch.autograd.grad(loss, weight)[0])
    assert calls["masked_rect"] == for_model(model).shape.layers
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_gradients_that_no_kernel_gives_keep_it_away(calls: Calls) -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), one(family)
    with mmfast.accelerate(model, "razor_attention(keep=0.4)"):
        cache = model(**batch.inputs, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits.sum().backward()
    model.zero_grad(set_to_none=True)
    assert not calls.used()


# ------------------------------------------------------------------------------ packed


def test_blocks_are_joined_once(calls: Calls) -> None:
    """Generated tokens are packed eight at a time; the step that packs them still sees them as they were."""
    family = FAMILIES["gemma3"]
    batch = one(family)
    with mmfast.kernels.use("torch"):
        off = generated(batch, "int8(residual=2)", 10)
    on = generated(batch, "int8(residual=2)", 10)
    assert torch.equal(on.tokens, off.tokens)
    # A code may be rounded the other way where a number lies between two of them.
    assert (on.logits - off.logits).abs().max() < 10 * CLOSE
    assert calls["quant_decode"] == 9 * full_layers(family)
    for layer, other in zip(on.output.past_key_values.layers, off.output.past_key_values.layers, strict=True):
        if layer.is_sliding:
            continue
        (row,), (wanted,) = layer._rows, other._rows
        for side in ("key", "value"):
            assert len(wanted[side].blocks) == 2
            assert len(row[side].blocks) == 1
            assert row[side].loose.shape == wanted[side].loose.shape
        held, apart = (sum(one.numel() for one in kept.storage()) for kept in (layer, other))
        assert held <= apart


@pytest.mark.slow
def test_with_the_masks_of_flash_attention(calls: Calls) -> None:
    """They are as long as the prompt was, and what is stored stands at their end."""
    batch, plan = mixed(FAMILIES["llava"]), "snapkv(keep=0.4, window=4) + int8(residual=2)"
    with mmfast.kernels.use("torch"):
        off = generated(batch, plan, 3)
    with flash_on_cpu():
        on = generated(batch, plan, 3, FLASH)
    assert torch.equal(on.tokens, off.tokens)
    assert (on.logits - off.logits).abs().max() < CLOSE
    assert calls.used() == {"quant_decode"}


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["int8(residual=2)", "adakv(keep=0.4)"])
def test_beams_follow(plan: str, calls: Calls) -> None:
    batch = one(FAMILIES["gemma3"])
    options = {"num_beams": 2, "steps": 6}
    with mmfast.kernels.use("torch"):
        off = generated(batch, plan, **options)
    on = generated(batch, plan, **options)
    assert torch.equal(on.output.sequences, off.output.sequences)
    assert calls.used()


def test_what_attention_cannot_read_is_restored(
    calls: Calls, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_TOLD", set())
    batch = one(FAMILIES["gemma3"])
    with caplog.at_level(logging.INFO, logger="mmfast.kernels"):
        compare(batch, "calibquant()", calls, 3)
    assert not calls.used()
    told = [record.getMessage() for record in caplog.records if "quant_decode" in record.getMessage()]
    assert told == [
        "quant_decode runs in torch: method 'calibquant' stores blocks in a form that attention cannot read"
    ]
    with pytest.raises(RuntimeError, match="'calibquant' stores blocks"), mmfast.kernels.use("triton"):
        generated(batch, "calibquant()", 2)


# ------------------------------------------------------------------------------ whether


def test_models_that_attend_in_their_own_way_are_left_alone(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["gemma3"]
    model = family.model()
    with torch.no_grad():
        for name, value in (("sinks", torch.zeros(1)), ("", None)):
            if name:
                monkeypatch.setattr(model.get_decoder().layers[0].self_attn, name, value, raising=False)
            else:
                monkeypatch.undo()
                monkeypatch.setattr(model.get_decoder().config, "attention_dropout", 0.1)
                model.get_decoder().train()
            try:
                with mmfast.accelerate(model, "int8(residual=2)"):
                    cache = model(**one(family).inputs, use_cache=True).past_key_values
                    model(input_ids=torch.tensor([[5]]), past_key_values=cache)
            finally:
                model.get_decoder().eval()
    assert not calls.used()


# ------------------------------------------------------------------------------ slices


def view(masked: bool) -> AttentionView:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(heads, length, 8, generator=generator) for heads, length in ((4, 20), (2, 23)))
    mask = torch.ones(20, 23, dtype=torch.bool).tril(3) if masked else None
    silent = torch.arange(20) < 2 if masked else None
    return AttentionView(query, key, None, 0.4, 3.0, mask, silent)


@pytest.mark.parametrize("masked", [False, True])
def test_slices_of_methods(masked: bool) -> None:
    visual, rows, columns = torch.arange(20) % 3 == 0, torch.tensor([4, 11, 19]), torch.tensor([0, 3, 7])

    def slices() -> tuple[Tensor, ...]:
        found = view(masked)
        return visual_saliency(found, visual), *text_attention(found, rows, columns)

    with mmfast.kernels.use("torch"):
        wanted = slices()
    with mmfast.kernels.use("triton"):
        found = slices()
    for own, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, right, rtol=1e-5, atol=1e-6)
