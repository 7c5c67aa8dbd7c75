"""Rows of attention beside the model's own attention function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mmfast
from mmfast.adapters.attention import Capture, attention_rows, register_tap, tap_name, unwatch, watch
from mmfast.adapters.ledger import Ledger
from support.cases import case_id, two
from support.checks import CLOSE, census, registries
from support.families import FAMILIES, Family


def full_attention(query: Tensor, key: Tensor, visible: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """The textbook: every row, in float64."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.double() @ key.transpose(-1, -2) * scaling
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize("form", ["none", "2d", "bool", "additive"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("past", [0, 4])
def test_rows_are_those_of_the_full_matrix(form: str, softcap: float | None, past: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 6, 8, generator=generator), torch.randn(2, 2, 6 + past, 8, generator=generator)
    causal = torch.ones(6, 6 + past, dtype=torch.bool).tril(past)
    padding = torch.ones(2, 6 + past, dtype=torch.bool)
    padding[1, :3] = False
    visible = causal.expand(2, 1, -1, -1) if form == "none" else causal & padding[:, None, None]
    mask = {
        "none": None,
        "2d": padding.long(),
        "bool": visible,
        "additive": torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min),
    }[form]
    rows = torch.tensor([5, 4])
    found = attention_rows(query, key, mask, rows, scaling=0.3, softcap=softcap)
    wanted = full_attention(query, key, visible, 0.3, softcap)[torch.arange(2), :, rows]
    assert found.shape == (2, 4, 6 + past)
    assert (found - wanted).abs().max() < 1e-6


def test_rows_are_read_in_float32() -> None:
    query, key = (torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    found = attention_rows(query, key, None, torch.tensor([4]))
    assert found.dtype == torch.float32
    assert torch.equal(found, attention_rows(query.float(), key.float(), None, torch.tensor([4])))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
def test_the_tap_reads_what_eager_attention_returns(family: Family) -> None:
    """And passes the call on, so that nothing else changes."""
    batch = two(family)
    with torch.no_grad():
        wanted = family.model("eager")(**batch.inputs, output_attentions=True).attentions
        model = family.model()
        before = model(**batch.inputs).logits
        ledger, tables = Ledger(), registries()
        config = model.get_decoder().config
        register_tap("sdpa", ledger)
        config._attn_implementation_internal = tap_name("sdpa")
        last = torch.tensor([batch.inputs["input_ids"].shape[1] - 1])
        captures = [Capture(last) for _ in wanted]
        modules = [layer.self_attn for layer in model.get_decoder().layers]
        try:
            for module, capture in zip(modules, captures, strict=True):
                watch(module, capture)
            tapped = model(**batch.inputs).logits
        finally:
            config._attn_implementation_internal = "sdpa"
            for module in modules:
                unwatch(module)
            ledger.undo()
    assert torch.equal(tapped, before)
    for capture, weights in zip(captures, wanted, strict=True):
        assert (capture.result - weights[:, :, -1]).abs().max() < CLOSE
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
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("bare")
