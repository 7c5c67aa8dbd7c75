"""What a plan cannot do is said in one clear error, and leaves the model as it was."""

from __future__ import annotations

import gc
import inspect
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, QuantizedCache
from transformers.cache_utils import Cache, DynamicLayer

import mmfast
from mmfast.adapters import families, for_model
from support.cases import case_id, mixed, one, two
from support.checks import CLOSE, census, first_logits, generate, registries
from support.families import FAMILIES, Family
from support.reference import expected

BEFORE, INSIDE = "divprune(keep=0.4)", "fastv(keep=0.4)"
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
every_plan = pytest.mark.parametrize("plan", [BEFORE, INSIDE])


class Unharmed:
    """Check that a model is what it was, and that the plan still works after a refusal."""

    def __init__(self, family: Family, plan: str) -> None:
        self.family, self.plan = family, plan
        self.model: Any = family.model()
        self.batch = one(family)
        self.logits = first_logits(self.model, self.batch.inputs)
        self.stock, self.tables = census(self.model), registries()

    def __enter__(self) -> Any:
        self.fast = mmfast.accelerate(self.model, self.plan)
        return self.model

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                pruned = first_logits(self.model, self.batch.inputs)[0]
                assert (pruned - expected(self.batch, self.plan).logits[0]).abs().max() < CLOSE
        finally:
            self.fast.remove()
        if kind is None:
            assert census(self.model) == self.stock
            assert registries() == self.tables
            assert torch.equal(first_logits(self.model, self.batch.inputs), self.logits)


@every_family
@every_plan
def test_offloaded_caches_are_refused(family: Family, plan: str) -> None:
    with Unharmed(family, plan) as model, pytest.raises(ValueError, match="got DynamicCache with offloading; leave"):
        generate(model, mixed(family).inputs, 2, cache_implementation="offloaded")


@every_family
@every_plan
def test_quantised_caches_are_refused(family: Family, plan: str) -> None:
    """The packages that quantise are not needed to see what kind of cache it is."""
    cache = QuantizedCache.__new__(QuantizedCache)
    Cache.__init__(cache, layer_class_to_replicate=DynamicLayer)
    with Unharmed(family, plan) as model, pytest.raises(ValueError, match=r"got QuantizedCache; .* such as kivi\(\)"):
        generate(model, {**mixed(family).inputs, "past_key_values": cache}, 2)


@every_family
@every_plan
@pytest.mark.parametrize("change", ["too many", "too few"])
def test_placeholders_that_do_not_fit_are_refused(family: Family, plan: str, change: str) -> None:
    """By transformers itself, in its own words, before anything is dropped."""
    image = family.image()
    batch = family.batch([2, image, 3])
    wrong = batch.inputs
    place = int((wrong["input_ids"][0] >= 120).nonzero()[2])
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in wrong:
            row = wrong[name][0].tolist()
            row[place : place + 1] = [row[place]] * 2 if change == "too many" else []
            wrong[name] = torch.tensor([row])
    try:
        generate(family.model(), wrong, 2)
    except (ValueError, RuntimeError, IndexError) as error:
        refusal = error
    else:
        pytest.skip("transformers itself takes these inputs, with no plan at work")
    with Unharmed(family, plan) as model, pytest.raises(type(refusal)) as refused:
        generate(model, wrong, 2)
    assert str(refused.value) == str(refusal)


@every_family
@every_plan
def test_prefill_in_chunks(family: Family, plan: str) -> None:
    """A chunk holds part of an image: refused where transformers can do it at all."""
    model, batch = family.model(), one(family)
    try:
        chunked = generate(model, batch.inputs, 2, prefill_chunk_size=7)
    except (ValueError, RuntimeError, TypeError, IndexError):
        pytest.skip("transformers itself cannot prefill this family in chunks")
    if (chunked.logits - generate(model, batch.inputs, 2).logits).abs().max() > CLOSE:
        pytest.skip("transformers itself computes something else when it prefills this family in chunks")
    with Unharmed(family, plan) as model, pytest.raises(ValueError, match="prefill"):
        generate(model, batch.inputs, 2, prefill_chunk_size=7)


@every_family
def test_a_second_plan_is_refused_or_replaces_the_first(family: Family) -> None:
    model, batch = family.model(), two(family)
    stock, tables, untouched = census(model), registries(), first_logits(model, batch.inputs)
    first = mmfast.accelerate(model, INSIDE)
    during = census(model)
    with pytest.raises(ValueError, match=r"already runs the plan 'fastv\(keep=0.4\)'"):
        mmfast.accelerate(model, BEFORE)
    assert first.active
    assert census(model) == during
    with pytest.raises(ValueError, match="layer=9"):
        mmfast.accelerate(model, "fastv(layer=9)", replace=True)
    assert first.active
    second = mmfast.accelerate(model, BEFORE, replace=True)
    assert (first.active, second.active) == (False, True)
    assert (first_logits(model, batch.inputs)[0] - expected(batch, BEFORE).logits[0]).abs().max() < CLOSE
    first.remove()
    assert second.active
    assert (first_logits(model, batch.inputs)[0] - expected(batch, BEFORE).logits[0]).abs().max() < CLOSE
    second.remove()
    assert census(model) == stock
    assert registries() == tables
    assert torch.equal(first_logits(model, batch.inputs), untouched)


def test_a_warning_that_is_an_error_leaves_the_first_plan_at_work() -> None:
    family = FAMILIES["llava"]
    model = family.model()
    stock, tables = census(model), registries()
    with mmfast.accelerate(model, BEFORE) as first:
        during = census(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=r"method 'pyramiddrop': keep=0\.01 as an average"):
                mmfast.accelerate(model, "pyramiddrop(keep=0.01)", replace=True)
        assert first.active
        assert census(model) == during
    assert census(model) == stock
    assert registries() == tables


def test_two_models_run_their_own_plans() -> None:
    """They share the registries of transformers: the first to go must not take the second's entry along."""
    names, tables = ("llava", "internvl"), registries()
    models = [FAMILIES[name].model() for name in names]
    first, second = (mmfast.accelerate(model, INSIDE) for model in models)
    first.remove()
    for name, model, plan in zip(names, models, ["full", INSIDE], strict=True):
        batch = one(FAMILIES[name])
        assert (first_logits(model, batch.inputs)[0] - expected(batch, plan).logits[0]).abs().max() < CLOSE
    second.remove()
    assert registries() == tables


@pytest.mark.parametrize("implementation", ["flex_attention", "paged|sdpa"])
def test_attention_whose_masks_cannot_be_gathered_is_refused(implementation: str) -> None:
    family = FAMILIES["llava"]
    config = family.config()
    model = type(family.model())._from_config(config, attn_implementation="sdpa")
    model.get_decoder().config._attn_implementation_internal = implementation
    stock = census(model)
    with pytest.raises(ValueError, match="cannot drop tokens inside the LLM with attention implementation"):
        mmfast.accelerate(model, INSIDE)
    assert census(model) == stock


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_model_that_is_dropped_takes_its_plan_along(name: str) -> None:
    family = FAMILIES[name]
    model = type(family.model())._from_config(family.config(), attn_implementation="sdpa")
    fast = mmfast.accelerate(model.eval(), INSIDE)
    first_logits(model, one(family).inputs)
    gone = weakref.ref(model)
    del model, fast
    gc.collect()
    assert gone() is None


def test_models_without_an_adapter_are_named() -> None:
    text_model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    stock = census(text_model)
    with pytest.raises(TypeError) as refusal:
        mmfast.accelerate(text_model, BEFORE)
    message = str(refusal.value)
    assert "no adapter for LlamaForCausalLM (model type 'llama') (nearest: llava" in message
    assert all(name in message for name in families())
    assert "Add a family" in message
    assert census(text_model) == stock
    with pytest.raises(TypeError, match="model must be a Hugging Face vision-language model, got str"):
        for_model("llava")
    with pytest.raises(TypeError, match=r"no adapter for Linear \(model type None\)"):
        for_model(nn.Linear(1, 1))


@every_family
def test_a_part_of_a_model_is_refused(family: Family) -> None:
    model = family.model()
    with pytest.raises(TypeError, match=r"cannot find the|no adapter for"):
        for_model(model.get_decoder())


def feature_arguments(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Pick what get_image_features() wants; one family's releases differ in the name of the pixels."""
    accepted = inspect.signature(model.model.get_image_features).parameters
    found = {name: inputs[name] for name in ("image_grid_thw", "image_sizes", "batch_num_images") if name in inputs}
    name, pixels = next((name, value) for name, value in inputs.items() if name.startswith("pixel_values"))
    return {**found, "pixel_values" if "pixel_values" in accepted else name: pixels}


@every_family
@every_plan
def test_features_encoded_without_the_plan_are_refused(family: Family, plan: str) -> None:
    model, batch = family.model(), one(family)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this release of transformers takes no features made ahead")
    arguments = feature_arguments(model, batch.inputs)
    inputs = {name: value for name, value in batch.inputs.items() if not name.startswith("pixel_values")}
    with torch.no_grad():
        features = model.model.get_image_features(**arguments, return_dict=True)
        with Unharmed(family, plan) as model:
            with pytest.raises(ValueError, match="precomputed image features were not made while this plan was active"):
                model(**inputs, mm_encoder_outputs={"image": features})
            again = model.model.get_image_features(**arguments, return_dict=True)
            logits = model(**inputs, mm_encoder_outputs={"image": again}).logits[:, -1]
            assert (logits[0] - expected(batch, plan).logits[0]).abs().max() < CLOSE


@every_family
@pytest.mark.parametrize("form", [{}, {"return_dict": True}, {"return_dict": False}], ids=["", "dict", "tuple"])
def test_features_may_be_asked_for_while_a_plan_is_at_work(family: Family, form: dict[str, bool]) -> None:
    """Whatever the form of the answer, it is the one of the untouched model."""
    model, batch = family.model(), two(family)
    arguments = feature_arguments(model, batch.inputs)
    with torch.no_grad():
        untouched = model.get_image_features(**arguments, **form)
        with mmfast.accelerate(model, BEFORE):
            during = model.get_image_features(**arguments, **form)
            assert (first_logits(model, batch.inputs)[0] - expected(batch, BEFORE).logits[0]).abs().max() < CLOSE
    mine, theirs = tensors_in(during), tensors_in(untouched)
    assert len(mine) > 0
    assert all(torch.equal(own, other) for own, other in zip(mine, theirs, strict=True))


def tensors_in(features: Any) -> list[torch.Tensor]:
    if isinstance(features, torch.Tensor):
        return [features]
    parts = features.values() if hasattr(features, "values") else features
    return [tensor for part in parts if part is not None for tensor in tensors_in(part)]
