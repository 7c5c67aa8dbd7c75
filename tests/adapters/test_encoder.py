"""Merging between the blocks of the vision encoder, against the same encoder worked out by hand."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast.adapters import for_model
from mmfast.plan import Plan
from mmfast.registry import get
from mmfast.token_pruning.base import VisionSignal
from mmfast.token_pruning.encoder_base import GROUPS
from support.cases import case_id, mixed, one, two, video
from support.checks import census, check_against_reference, first_logits, generate
from support.families import FAMILIES, Batch, Family, cast
from support.probes import InnerProbe, wanted
from support.prompts import Media
from support.reference import decoder_inputs, items_of
from support.shrunken import MERGES_INSIDE, acting, shrunken

INSIDE = [FAMILIES[name] for name in MERGES_INSIDE]
OTHERS = [family for name, family in FAMILIES.items() if name not in MERGES_INSIDE]
CASES = [(family, case) for family in INSIDE for case in (two, mixed, *([video] if family.has_video else []))]
PLANS = {
    "even": "tome(keep=0.5, where='encoder')",
    "few": "tome(keep=3, where='encoder')",
    "one": "tome(keep=1, where='encoder', proportional=False)",
    "windows": "mustdrop_vision(keep=6, window=2, threshold=-1.0)",
    "some windows": "mustdrop_vision(keep=3, window=2, threshold=0.1)",
    "no window": "mustdrop_vision(keep=6, threshold=1.0)",
}

inside = pytest.mark.parametrize("family", INSIDE, ids=case_id)


@contextmanager
def counting(family: Family, modality: str = "image") -> Iterator[list[tuple[int, int]]]:
    """Note how many tokens enter each block of the encoder."""
    adapter, seen = for_model(family.model()), []

    def note(index: int) -> Callable[..., None]:
        return lambda module, args: seen.append((index, args[0].shape[1]))

    handles = [
        block.register_forward_pre_hook(note(index)) for index, block in enumerate(adapter.vision_blocks(modality))
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("family", "case"), CASES, ids=case_id)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_it_computes_what_the_reference_does(family: Family, case: Callable[[Family], Batch], plan: str) -> None:
    """Also exactly the promised number of tokens, of each image, and batches as one by one."""
    check_against_reference(case(family), plan, steps=2)


@inside
def test_eager_attention(family: Family) -> None:
    check_against_reference(mixed(family), PLANS["few"], "eager", steps=2)


@inside
def test_blocks_run_on_fewer_tokens(family: Family) -> None:
    adapter, batch = for_model(family.model()), one(family)
    (item,) = items_of(batch)
    total, first = len(item.slots), int(adapter.class_token("image"))
    used = adapter.feature_block("image", {})
    with mmfast.accelerate(family.model(), PLANS["few"]), counting(family) as seen:
        first_logits(family.model(), batch.inputs)
    lengths = dict(seen)
    assert lengths[0] == total + first
    assert lengths[used] == 3 + first
    assert sorted(lengths.values(), reverse=True) == [lengths[index] for index in sorted(lengths)]
    with mmfast.accelerate(family.model(), PLANS["windows"]), counting(family) as seen:
        first_logits(family.model(), batch.inputs)
    windows = min((math.isqrt(total) // 2) ** 2, (total - 6) // 3)
    assert {length for index, length in seen if index > 0} == {total - 3 * windows + first}


@inside
def test_as_many_windows_are_merged_as_each_picture_allows(family: Family) -> None:
    """One picture of a single colour and one of noise, in one run of the encoder."""
    flat = family.image(0, 1)
    colour = {name: torch.ones_like(value) for name, value in flat.tensors.items()}
    batch = family.batch([2, Media("image", flat.ids, flat.layouts, colour), 2, family.image(0, 2), 3])
    method = get("mustdrop_vision").method(keep=4, window=2, threshold=0.35)
    items = items_of(batch)
    with shrunken(family.model("eager"), acting(method, family.name), items) as expected:
        decoder_inputs(family.model("eager"), batch.inputs)
    assert expected.entered[0][-1] < expected.entered[1][-1]
    with mmfast.accelerate(family.model(), [method]), counting(family) as seen:
        first_logits(family.model(), batch.inputs)
    assert dict(seen)[1] == max(row[1] for row in expected.entered)
    check_against_reference(batch, [method], steps=2)


def test_nothing_merged_is_the_untouched_encoder() -> None:
    family = FAMILIES["llava"]
    batch = mixed(family)
    plain = generate(family.model(), batch.inputs, 3)
    for plan in ("tome(keep=1.0, where='encoder')", "mustdrop_vision(keep=1.0)"):
        with mmfast.accelerate(family.model(), plan):
            assert torch.equal(generate(family.model(), batch.inputs, 3).logits, plain.logits)
    # Where no window is alike enough the encoder does what it always does; only tokens are dropped behind it.
    features = []
    for plan in ("full", "mustdrop_vision(keep=4, threshold=1.0)"):
        with mmfast.accelerate(family.model(), plan), torch.no_grad():
            features.append(family.model().model.get_image_features(**pixels(batch)).pooler_output)
    assert all(torch.equal(*pair) for pair in zip(*features, strict=True))


def pixels(batch: Batch) -> dict[str, Tensor]:
    return {"pixel_values": batch.inputs["pixel_values"]}


# ------------------------------------------------------------------------- what others see of it


def test_a_token_without_company_keeps_its_feature() -> None:
    """Every patch gets the feature of its token back, so the tokens kept are all there is to see."""
    family = FAMILIES["llava"]
    batch = one(family)
    method = get("tome").method(keep=7, where="encoder")
    with mmfast.accelerate(family.model(), [method]), torch.no_grad():
        (features,) = family.model().model.get_image_features(**pixels(batch)).pooler_output
    assert features.shape[0] == 25
    assert features.unique(dim=0).shape[0] == 7


@pytest.mark.parametrize("kind", ["patch_features", "keys", "cls_attention", "received_attention"])
def test_signals_follow_the_merged_tokens(kind: Any) -> None:
    family = FAMILIES["llava"]
    batch, merging = one(family), get("tome").method(keep=5, where="encoder")
    layers = range(for_model(family.model()).feature_block("image", {}) + 2)
    signals = wanted(**{f"at_{layer}": VisionSignal(kind, layer) for layer in layers})
    InnerProbe.seen.clear()
    with mmfast.accelerate(family.model(), Plan((merging, InnerProbe(layer=1, keep=2, signals=signals)))) as fast:
        first_logits(family.model(), batch.inputs)
        (record,) = fast.report().media
    (seen,) = InnerProbe.seen
    assert all(len(value) == 5 for value in seen.signals.values())
    with shrunken(family.model("eager"), merging, items_of(batch)) as expected:
        decoder_inputs(family.model("eager"), batch.inputs)
    if kind == "patch_features":
        for layer in layers:
            rows = expected.states[0][layer + 1][1:][record.entered_indices]
            assert torch.allclose(seen.signals[f"at_{layer}"], rows, atol=1e-5)
    elif kind == "cls_attention":
        weights = expected.attention["image"][0][record.entered_indices]
        assert torch.allclose(seen.signals[f"at_{max(layers)}"], weights, atol=1e-6)


def test_the_encoder_can_be_trained_through_it() -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), mixed(family)
    weight = model.model.vision_tower.embeddings.patch_embedding.weight
    with mmfast.accelerate(model, PLANS["few"]):
        model(**batch.inputs).logits[:, -1].square().sum().backward()
    try:
        assert bool(weight.grad.isfinite().all())
        assert float(weight.grad.abs().max()) > 0
    finally:
        model.zero_grad(set_to_none=True)


@inside
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("plan", [PLANS["few"], PLANS["some windows"]], ids=["few", "some windows"])
def test_half_precision(family: Family, dtype: torch.dtype, plan: str) -> None:
    model = family.model(dtype=dtype)
    with mmfast.accelerate(model, plan) as fast:
        logits = first_logits(model, cast(mixed(family).inputs, dtype))
        assert all(record.entered == 3 for record in fast.report().media)
    assert bool(logits.isfinite().all())


# ------------------------------------------------------------------------------ undone, or refused


@inside
def test_nothing_is_left_behind(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = family.model(), two(family)
    logits, stock = first_logits(model, batch.inputs), census(model)

    def fail(*_: object) -> None:
        raise RuntimeError("the method gave up")

    with mmfast.accelerate(model, PLANS["few"]):
        good, during = first_logits(model, batch.inputs), census(model)
        with monkeypatch.context() as patch:
            patch.setattr(get("tome").method, "merge_block", fail)
            with pytest.raises(RuntimeError, match="the method gave up"):
                first_logits(model, batch.inputs)
        assert census(model) == during
        assert torch.equal(first_logits(model, batch.inputs), good)
    assert census(model) == stock
    assert torch.equal(first_logits(model, batch.inputs), logits)


@pytest.mark.parametrize("family", OTHERS, ids=case_id)
def test_models_that_join_patches_are_refused(family: Family) -> None:
    model, stock = family.model(), census(family.model())
    with pytest.raises(ValueError, match=r"where='encoder' is not possible on this model: .*where='output' works"):
        mmfast.accelerate(model, "tome(where='encoder')")
    assert census(model) == stock
    with mmfast.accelerate(model, "tome(keep=2, where='output')") as fast:
        first_logits(model, one(family).inputs)
        assert {record.entered - int(newlines(record)) for record in fast.report().media} == {2}


def newlines(record: Any) -> Tensor:
    return record.layout.is_newline[record.entered_indices].sum()


@pytest.mark.parametrize(("family", "where"), [("llava", "encoder"), ("qwen2_vl", "output")])
def test_left_open_it_takes_the_encoder_where_it_can(family: str, where: str) -> None:
    model = FAMILIES[family].model()
    with mmfast.accelerate(model, "tome(where=None)") as fast:
        (method,) = fast._binding.plan.methods
        assert method.where == where
        assert (GROUPS in method.vision_signals()) == (where == "encoder")


def test_attention_that_takes_no_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llava"].model()
    config = model.model.vision_tower.config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="'flash_attention_2' of its vision encoder cannot weigh tokens"):
        mmfast.accelerate(model, PLANS["few"])


def test_features_of_the_first_block_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llava"].model()
    monkeypatch.setattr(model.config, "vision_feature_layer", 1)
    with pytest.raises(ValueError, match="features of the first block"):
        mmfast.accelerate(model, PLANS["few"])


def test_features_made_before_are_refused() -> None:
    family = FAMILIES["llava"]
    batch = one(family)
    if "mm_encoder_outputs" not in inspect.signature(family.model().forward).parameters:
        pytest.skip("this transformers takes no features made before")
    with torch.no_grad():
        output = family.model().model.get_image_features(**pixels(batch))
    inputs = {name: value for name, value in batch.inputs.items() if name != "pixel_values"}
    with mmfast.accelerate(family.model(), PLANS["few"]), pytest.raises(ValueError, match="encode the media after"):
        family.model()(**inputs, mm_encoder_outputs={"image": output})
