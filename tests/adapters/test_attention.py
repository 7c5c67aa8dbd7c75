"""What attention modules attend with, read beside the model's own attention function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mmfast
from mmfast.adapters.attention import (
    Attended,
    Capture,
    CaptureDone,
    register_answered,
    register_tap,
    tap_name,
    watch,
    watchers,
)
from mmfast.adapters.ledger import Ledger
from support.cases import case_id, mixed, one
from support.checks import CLOSE, census, first_logits, registries
from support.families import FAMILIES, Family


def full_attention(query: Tensor, key: Tensor, visible: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """The textbook: every row, in float64."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.double() @ key.transpose(-1, -2) * scaling
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)


# Masks of four dimensions are made for a cache: they may have more columns than there are keys.
FORMS = [(form, past, 0) for form in ("none", "2d", "bool", "additive", "shared") for past in (0, 4)]
FORMS += [(form, 0, 3) for form in ("bool", "additive", "shared")]


@pytest.mark.parametrize(("form", "past", "longer"), FORMS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_view_cuts_one_prompt_out(form: str, past: int, longer: int, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 6 + more, 8, generator=generator) for heads, more in ((4, 0), (2, past), (2, past))
    )
    causal = torch.ones(6, 6 + past, dtype=torch.bool).tril(past)
    padding = torch.ones(2, 6 + past, dtype=torch.bool)
    padding[1, past : past + 2] = False
    visible = causal.expand(2, 1, -1, -1) if form in ("none", "shared") else causal & padding[:, None, None]
    given = torch.cat([torch.ones(*visible.shape[:-1], longer, dtype=torch.bool), visible], dim=-1)
    mask = {
        "none": None,
        "2d": padding.long(),
        "bool": given,
        "additive": torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min),
        "shared": given[:1],
    }[form]
    capture = Capture(torch.arange(6).expand(2, -1), False, query, key, value, mask, 0.3, softcap)
    wanted = full_attention(query, key, visible, 0.3, softcap)
    for row, places in enumerate([None, torch.tensor([2, 3, 5])]):
        own = torch.arange(6) if places is None else places
        columns = torch.cat([torch.arange(past), own + past])
        view = capture.view(row, places)
        assert (view.length, view.past) == (len(own), past)
        assert torch.equal(view.query, query[row][:, own])
        assert torch.equal(view.key, key[row][:, columns])
        assert torch.equal(view.value, value[row][:, columns])
        # Dropped tokens take nothing: what a row sees is shared out among those that are left.
        kept = wanted[row][:, own][:, :, columns]
        kept = kept / kept.sum(dim=-1, keepdim=True)
        rows = torch.arange(len(own))
        assert (view.rows(rows) - kept[..., past:]).abs().max() < 1e-6


def test_a_view_of_what_never_ran_is_refused() -> None:
    with pytest.raises(RuntimeError, match="was not run between the request for its attention and its use"):
        Capture(torch.arange(3)[None]).view(0, None)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_tap_reads_what_eager_attention_returns(family: Family, attention: str) -> None:
    """For every layer, head, row and column of padded prompts; and passes the call on, so that nothing changes."""
    batch = mixed(family)
    real = batch.inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = family.model("eager")(**batch.inputs, output_attentions=True).attentions
        model = family.model(attention)
        before = model(**batch.inputs).logits
        ledger, tables = Ledger(), registries()
        config = model.get_decoder().config
        register_tap(attention, ledger)
        config._attn_implementation_internal = tap_name(attention)
        slots = torch.arange(real.shape[1]).expand(len(batch), -1)
        captures = [Capture(slots) for _ in wanted]
        modules = [layer.self_attn for layer in model.get_decoder().layers]
        for module, capture in zip(modules, captures, strict=True):
            ledger.enter(watch(module, capture))
        try:
            tapped = model(**batch.inputs).logits
        finally:
            config._attn_implementation_internal = attention
            ledger.undo()
    assert torch.equal(tapped, before)
    assert registries() == tables
    for capture, weights in zip(captures, wanted, strict=True):
        for row, own in enumerate(weights):
            places = real[row].nonzero().squeeze(-1)
            view = capture.view(row, places)
            assert (view.rows(torch.arange(len(places))) - own[:, places][:, :, places]).abs().max() < CLOSE


def test_reading_may_end_the_module_early() -> None:
    model = FAMILIES["llava"].model()
    ledger = Ledger()
    register_tap("sdpa", ledger)
    config = model.get_decoder().config
    config._attn_implementation_internal = tap_name("sdpa")
    module = model.get_decoder().layers[1].self_attn
    capture = Capture(torch.arange(4)[None], stop=True)
    ledger.enter(watch(module, capture))
    hidden = torch.randn(1, 4, model.get_decoder().config.hidden_size, generator=torch.Generator().manual_seed(0))
    try:
        tables = model.get_decoder().rotary_emb(hidden, torch.arange(4)[None])
        with pytest.raises(CaptureDone):
            module(hidden_states=hidden, position_embeddings=tables, attention_mask=None)
    finally:
        config._attn_implementation_internal = "sdpa"
        ledger.undo()
    assert capture.view(0, None).length == 4
    assert capture.query is not None
    assert not capture.query.requires_grad


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_a_listener_may_attend_itself(first: bool) -> None:
    """The module's own function is not called then, and others are told all the same."""
    model = FAMILIES["llava"].model()
    module, config, ledger = model.get_decoder().layers[1].self_attn, model.get_decoder().config, Ledger()
    hidden = torch.randn(2, 4, config.hidden_size, generator=torch.Generator().manual_seed(0))
    output = torch.randn(2, config.num_attention_heads, 4, module.head_dim)

    class Attending:
        def take(self, *_: object) -> Attended:
            return Attended(output)

    capture = Capture(torch.arange(4).expand(2, -1))
    register_tap("sdpa", ledger)
    ledger.set_attribute(config, "_attn_implementation_internal", tap_name("sdpa"))
    assert watchers(module) == 0
    for listener in (Attending(), capture) if first else (capture, Attending()):
        ledger.enter(watch(module, listener))
    assert watchers(module) == 2
    try:
        tables = model.get_decoder().rotary_emb(hidden, torch.arange(4)[None])
        with torch.no_grad():
            found, weights = module(hidden_states=hidden, position_embeddings=tables, attention_mask=None)
            wanted = module.o_proj(output.transpose(1, 2).flatten(2))
    finally:
        ledger.undo()
    assert torch.equal(found, wanted)
    assert weights is None
    assert capture.view(1, None).length == 4


def test_no_mask_is_made_where_every_call_is_answered() -> None:
    family = FAMILIES["llava"]
    model, ledger, tables, masks = family.model(), Ledger(), registries(), []

    class Attending:
        def take(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: object) -> Attended:
            masks.append(mask)
            return Attended(query)

    ledger.set_attribute(model.get_decoder().config, "_attn_implementation_internal", register_answered(ledger))
    for layer in model.get_decoder().layers:
        ledger.enter(watch(layer.self_attn, Attending()))
    try:
        with torch.no_grad():
            model(**mixed(family).inputs)
    finally:
        ledger.undo()
    assert masks == [None] * len(model.get_decoder().layers)
    assert registries() == tables


def test_the_last_user_takes_the_tap_out() -> None:
    tables = registries()
    first, second = Ledger(), Ledger()
    register_tap("eager", first)
    register_tap("eager", second)
    first.undo()
    assert tap_name("eager") in registries()[0]
    second.undo()
    assert registries() == tables


def test_the_tap_keeps_the_word_that_transformers_looks_for() -> None:
    assert "flash" in tap_name("flash_attention_2")
    assert "sdpa" in tap_name("sdpa")


def test_an_implementation_without_masks_is_refused() -> None:
    """transformers would pass it no mask, without a word."""
    ALL_ATTENTION_FUNCTIONS.register("bare", ALL_ATTENTION_FUNCTIONS["sdpa"])
    try:
        tables, model = registries(), FAMILIES["llava"].model("bare")
        stock = census(model)
        with pytest.raises(ValueError, match="attention implementation 'bare' has no mask function"):
            mmfast.accelerate(model, "fastv()")
        assert registries() == tables
        assert census(model) == stock
        with mmfast.accelerate(model, "uniform(keep=3)") as fast:
            with pytest.raises(ValueError, match="attention implementation 'bare' has no mask function"):
                mmfast.accelerate(model, "fastv()", replace=True)
            assert fast.active
            first_logits(model, one(FAMILIES["llava"]).inputs)
            assert fast.report().media[0].entered == 3
        assert registries() == tables
        assert census(model) == stock
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("bare")
