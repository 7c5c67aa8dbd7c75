"""Compression tokens on every family: what is hidden, what leaves the caches, and what is left alone.

This is the battery of methods of the kind ``Compressor``, which need prompts of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from support import compressing as prompts
from support.cases import case_id
from support.checks import (
    CLOSE,
    FAR,
    census,
    check_against_reference,
    check_row,
    first_logits,
    generate,
    registries,
)
from support.compressing import COUNT, compressing
from support.families import FAMILIES, Batch, Family
from support.prompts import VOCO
from support.reference import expected, items_of

DISTINCT = ("llava", "llava_next", "qwen2_5_vl", "internvl", "gemma3")
SERVED = [
    pytest.param(family, marks=[] if family.name in DISTINCT else pytest.mark.slow)
    for family in FAMILIES.values()
    if family.name != "paligemma"
]
every = pytest.mark.parametrize("family", SERVED, ids=case_id)
PLAN = "voco()"
STEPS = 3


@every
@pytest.mark.parametrize("plan", [PLAN, 'voco(hide_prefix="visual")'])
@pytest.mark.parametrize("case", [prompts.one, prompts.two], ids=case_id)
def test_logits_of_prompt_and_steps(family: Family, plan: str, case: Callable[[Family], Batch]) -> None:
    with compressing(family):
        check_against_reference(case(family), plan, steps=STEPS)


@every
def test_a_batch_of_mixed_prompts(family: Family) -> None:
    batch, model = prompts.mixed(family), family.model()
    with compressing(family):
        untouched = generate(model, batch.inputs, STEPS)
        with mmfast.accelerate(model, PLAN) as fast:
            done = generate(model, batch.inputs, STEPS)
            report = fast.report()
        for row in range(len(batch)):
            check_row(batch.alone(row), PLAN, row, done, report)
    apart = (done.logits[:, 0] - untouched.logits[:, 0]).abs().amax(dim=-1)
    assert bool((apart[:2] > FAR).all())
    # Rows that say nothing of compression run as they are.
    assert bool((apart[2:] < CLOSE).all())


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.has_video], ids=case_id)
def test_videos(family: Family) -> None:
    with compressing(family):
        check_against_reference(prompts.video(family), PLAN, steps=1, far=0.0)


@every
def test_decoding_reads_the_compression_tokens_alone(family: Family) -> None:
    batch, model = prompts.two(family), family.model()
    ids = batch.ids[0]
    marked = [place for place, token in enumerate(ids) if token == VOCO]
    second = min(place for item in items_of(batch) for place in item.slots.tolist() if place > marked[0])
    # Text between the images belongs to neither.
    stays = [*marked[:COUNT], *range(marked[COUNT - 1] + 1, second), *marked[COUNT:], *range(marked[-1] + 1, len(ids))]
    with compressing(family), mmfast.accelerate(model, PLAN) as fast:
        cache = generate(model, batch.inputs, 1).output.past_key_values
        report = fast.report()
    for layer in cache.layers:
        assert layer.slots[0].tolist() == stays
        assert layer.keys.shape[2] == len(stays)
    assert report.kv_bytes < 0.6 * report.full_kv_bytes


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
def test_one_pass_equals_two(name: str) -> None:
    """Read the image with a bare model, keep the cache of the compression tokens alone, and go on from it."""
    family = FAMILIES[name]
    batch, model = prompts.one(family), family.model()
    inputs = batch.inputs
    ids = inputs["input_ids"]
    places = (ids[0] == VOCO).nonzero().flatten()
    end = int(places[-1]) + 1
    positions: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("position_ids")
        positions.append(torch.arange(ids.shape[1])[None] if given is None else given)

    with compressing(family), mmfast.accelerate(model, PLAN), torch.no_grad():
        handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        once = model(**inputs).logits[0, end:]
        handle.remove()
    prefix = {n: v[:, :end] if v.shape == ids.shape else v for n, v in inputs.items()}
    with torch.no_grad():
        cache = model(**prefix, use_cache=True).past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, places], layer.values[:, :, places]
        # The decoder alone: a bare outer model would count positions from the length of the cache.
        embeds = model.get_input_embeddings()(ids[:, end:])
        hidden = model.get_decoder()(
            inputs_embeds=embeds, position_ids=positions[0][..., end:], past_key_values=cache, use_cache=True
        ).last_hidden_state
        twice = model.lm_head(hidden)[0]
        whole = model(**inputs).logits[0, end:]
    assert (once - twice).abs().max() < CLOSE
    assert (once - whole).abs().max() > FAR


@every
def test_without_a_cache_and_with_beams(family: Family) -> None:
    batch, model = prompts.one(family), family.model()
    with compressing(family), mmfast.accelerate(model, PLAN):
        cached = generate(model, batch.inputs, STEPS)
        bare = generate(model, batch.inputs, STEPS, use_cache=False)
        beams = generate(model, batch.inputs, STEPS, num_beams=2)
        alike = generate(model, batch.inputs, STEPS, num_beams=2, use_cache=False)
    assert torch.equal(cached.tokens, bare.tokens)
    assert (cached.logits - bare.logits).abs().max() < CLOSE
    assert torch.equal(beams.tokens, alike.tokens)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_static_cache_gives_the_same(name: str) -> None:
    family = FAMILIES[name]
    batch, model = prompts.one(family), family.model()
    with compressing(family), mmfast.accelerate(model, PLAN):
        grown = generate(model, batch.inputs, STEPS)
        fixed = generate(model, batch.inputs, STEPS, cache_implementation="static", disable_compile=True)
    assert (grown.logits - fixed.logits).abs().max() < CLOSE


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_ids_and_embeddings_tell_the_same_tokens(name: str) -> None:
    family = FAMILIES[name]
    batch, model = prompts.one(family), family.model()
    with compressing(family), mmfast.accelerate(model, PLAN), torch.no_grad():
        inputs = batch.inputs
        by_id = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        rest = {n: v for n, v in inputs.items() if n != "input_ids"}
        if name == "llava":
            assert (model(inputs_embeds=embeds, **rest).logits - by_id).abs().max() < CLOSE
        else:
            # Positions of several dimensions are made of ids.
            assert model(inputs_embeds=embeds, **rest).logits.shape == by_id.shape


@pytest.mark.parametrize("name", DISTINCT)
def test_text_and_uncompressed_images_are_untouched(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    for batch in (family.batch([9], [5]), family.batch([2, family.image(), 3])):
        before = first_logits(model, batch.inputs)
        with compressing(family), mmfast.accelerate(model, PLAN):
            assert torch.equal(first_logits(model, batch.inputs), before)


@every
def test_remove_gives_everything_back(family: Family) -> None:
    batch, model = prompts.one(family), family.model()
    with compressing(family):
        before, stock, tables = first_logits(model, batch.inputs), census(model), registries()
        fast = mmfast.accelerate(model, PLAN)
        assert (first_logits(model, batch.inputs) - before).abs().max() > FAR
        fast.remove()
        assert torch.equal(first_logits(model, batch.inputs), before)
        assert census(model) == stock
        assert registries() == tables


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize(
    "also", ["uniform(keep=0.5)", "fastv(layer=2, keep=0.5)", "knorm(keep=0.8)", "int8(residual=2)"]
)
def test_beside_other_methods(name: str, also: str) -> None:
    """What has been hidden is gone, whatever else is dropped, evicted or packed."""
    family = FAMILIES[name]
    batch, model = prompts.two(family), family.model()
    hidden = int((torch.tensor(batch.ids[0]) == VOCO).nonzero().flatten()[0])
    with compressing(family), mmfast.accelerate(model, f"{also} + {PLAN}"):
        done = generate(model, batch.inputs, STEPS)
        again = generate(model, batch.inputs, STEPS)
        for layer in done.output.past_key_values.layers:
            real = layer.real_entries()[0].any(dim=0)
            assert int(layer.slots[0][real].min()) >= hidden
    assert bool(done.logits.isfinite().all())
    assert torch.equal(done.logits, again.logits)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_second_turn_with_a_new_image(name: str) -> None:
    """What earlier turns left stays; the new image is compressed as the first was."""
    family = FAMILIES[name]
    model = family.model()
    turns = [[2, family.image(0, 1), prompts.marks(), 4], [3, family.image(0, 2), prompts.marks(), 2]]
    first, both = family.batch(turns[0]), family.batch([*turns[0], *turns[1]])
    done, whole = len(first.ids[0]), len(both.ids[0])
    with compressing(family):
        wanted = expected(both, PLAN, turns=[(0, done), (done, whole)]).logits[0]
        with mmfast.accelerate(model, PLAN), torch.no_grad():
            cache = model(**first.inputs, use_cache=True).past_key_values
            ids = both.inputs["input_ids"]
            pixels = {n: v for n, v in family.batch(turns[1]).inputs.items() if v.ndim > 2}
            mask = torch.ones_like(ids)
            later = model(input_ids=ids[:, done:], attention_mask=mask, past_key_values=cache, **pixels).logits[0, -1]
    assert (later - wanted).abs().max() < CLOSE


def test_training_gets_the_same_gradients_as_a_mask_by_hand() -> None:
    family = FAMILIES["llava"]
    batch, model = prompts.one(family), family.model()
    ids = batch.inputs["input_ids"]
    places = (ids[0] == VOCO).nonzero().flatten()
    first, end = int(places[0]), int(places[-1]) + 1
    weight = model.get_decoder().layers[1].self_attn.k_proj.weight
    with compressing(family), mmfast.accelerate(model, PLAN):
        loss = model(**batch.inputs, labels=ids, use_cache=False).loss
        (found,) = torch.autograd.grad(loss, weight)
    visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    visible[end:, :first] = False
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    inputs = {**batch.inputs, "attention_mask": additive[None, None]}
    by_hand = model(**inputs, labels=ids, use_cache=False).loss
    (wanted,) = torch.autograd.grad(by_hand, weight)
    assert (loss - by_hand).abs() < 1e-5
    assert (found - wanted).abs().max() < 1e-5


def test_where_it_cannot_work_it_says_so() -> None:
    family = FAMILIES["llava"]
    with pytest.raises(ValueError, match="needs a model with compression tokens, and this one has none"):
        mmfast.accelerate(family.model(), PLAN)
    other = FAMILIES["paligemma"]
    with compressing(other), pytest.raises(ValueError, match="'paligemma', which reads prompts in both directions"):
        mmfast.accelerate(other.model(), PLAN)
    told = pytest.raises(ValueError, match="tokens=2, but an image of the prompt has 3 compression tokens")
    with compressing(family), mmfast.accelerate(family.model(), "voco(tokens=2)"), told:
        first_logits(family.model(), prompts.one(family).inputs)
