"""Caches that were evicted, packed or are read in part, used in every way a cache is used."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch

import mmfast
from mmfast.kv.cache import LogicalLength
from support.cache_plans import METHODS, plan_of
from support.cached import remembered
from support.cases import case_id, one
from support.checks import CLOSE, FAR, generate
from support.families import FAMILIES, Batch, Family
from support.flash import FLASH, flash_on_cpu
from support.prompts import IMAGE, VOCABULARY, text

STEPS = 4
KINDS = [
    "snapkv(keep=0.4, window=4)",
    "razor_attention(keep=0.4)",
    "h2o(keep=0.4)",
    "prefixkv(keep=0.4)",
    "lookm(keep=0.4)",
    "snapkv(keep=0.4, window=4) + key_rerotation()",
    "quest(keep=0.4, dense_layers=0, page_size=2)",
]
"""One plan of every kind that changes the books of a cache in its own way."""
PLAIN = ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3"]
"""Families whose caches transformers itself continues exactly."""
PLAIN_TEXT = {"suppress_tokens": list(range(IMAGE, VOCABULARY))}

every_kind = pytest.mark.parametrize("plan", KINDS)
every_plain = pytest.mark.parametrize("name", PLAIN)


def turn(family: Family) -> Batch:
    """Rows of different lengths, with one image each."""
    return family.batch([3, family.image(0, 1), 4], [6, family.image(0, 2), 7])


def works(name: str, plan: str) -> bool:
    """Say whether positions can be renumbered, where the plan does that."""
    return "key_rerotation" not in plan or name not in ("qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize(("name", "plan"), [pair for pair in product(PLAIN, KINDS) if works(*pair)])
def test_a_second_question(name: str, plan: str) -> None:
    """Only the first prompt is shortened; what follows it is read and stored as a whole."""
    family = FAMILIES[name]
    model, first = family.model(), turn(family)
    asked = text(5, 9)
    with mmfast.accelerate(model, plan):
        answer = generate(model, first.inputs, STEPS)
        ids = torch.cat([first.inputs["input_ids"], answer.tokens, torch.tensor([asked] * 2)], dim=1)
        mask = torch.cat([first.inputs["attention_mask"], torch.ones(2, STEPS + 5, dtype=torch.int64)], dim=1)
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": answer.output.past_key_values}
        done = generate(model, inputs, STEPS)
    if "h2o" in plan or "prefixkv" in plan or "quest" in plan:
        # They act at every single token, which several tokens read at once are not.
        assert bool(done.logits.isfinite().all())
        return
    for row in range(2):
        given = [*answer.tokens[row].tolist(), *asked, *done.tokens[row, :-1].tolist()]
        wanted = remembered(first.alone(row), plan, given).logits[STEPS + 5 :]
        assert (done.logits[row] - wanted).abs().max() < CLOSE


@pytest.mark.parametrize(
    ("name", "plan"),
    [pair for pair in product(["llava", "qwen2_5_vl"], [*KINDS, "kivi(bits=4, group=8, residual=8)"]) if works(*pair)],
)
def test_beams_follow_their_caches(name: str, plan: str) -> None:
    """The score of the best sequence is what the reference gives to it."""
    family = FAMILIES[name]
    model, batch = family.model("eager"), one(family)
    with mmfast.accelerate(model, plan):
        found = generate(model, batch.inputs, 3, num_beams=3, length_penalty=0.0, output_scores=True)
    tokens = found.output.sequences[0, batch.inputs["input_ids"].shape[1] :].tolist()
    logits = remembered(batch, plan, tokens[:-1]).logits
    scores = logits.log_softmax(dim=-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
    # Beams of quantised entries are read in a batch, where attention rounds differently.
    limit = 0.05 if "kivi" in plan else 1e-3
    assert float(found.output.sequences_scores[0]) == pytest.approx(float(scores.sum()), abs=limit)


@pytest.mark.parametrize(("name", "plan"), [pair for pair in product(PLAIN, KINDS) if works(*pair)])
def test_generated_tokens_are_taken_back(name: str, plan: str) -> None:
    family = FAMILIES[name]
    model, batch = family.model(), turn(family)
    with mmfast.accelerate(model, plan):
        answer = generate(model, batch.inputs, STEPS)
        cache = answer.output.past_key_values
        length = cache.get_seq_length()
        if "h2o" in plan or "prefixkv" in plan:
            with pytest.raises(ValueError, match="cannot take back 2 tokens"):
                cache.crop(-2)
            return
        other = copy.deepcopy(cache)
        cache.crop(-2)
        assert cache.get_seq_length() == length - 2
        again = torch.cat([batch.inputs["input_ids"], answer.tokens[:, : STEPS - 2]], dim=1)
        mask = torch.cat([batch.inputs["attention_mask"], torch.ones(2, STEPS - 2, dtype=torch.int64)], dim=1)
        inputs = {"input_ids": again, "attention_mask": mask, "past_key_values": cache}
        repeated = generate(model, inputs, 2)
        assert torch.equal(repeated.tokens, answer.tokens[:, -2:])
        assert (repeated.logits - answer.logits[:, -2:]).abs().max() < CLOSE
        with pytest.raises(ValueError, match="cannot take back 20 tokens: the cache holds a pruned prompt"):
            other.crop(-20)


@every_plain
@pytest.mark.parametrize("plan", ["snapkv(keep=0.4, window=4)", "razor_attention(keep=0.4)", "lookm(keep=0.4)"])
def test_prompt_lookup(name: str, plan: str) -> None:
    """Several tokens are verified at once, and those refused are taken back.

    Tokens drafted together with the prompt still see all of it: eviction comes after the call.
    """
    family = FAMILIES[name]
    model, batch = family.model(), one(family)
    with mmfast.accelerate(model, plan):
        drafted = model.generate(
            **batch.inputs, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3, **PLAIN_TEXT
        )
    tokens = drafted[0, -10:].tolist()
    logits = remembered(batch, plan, tokens[:-1]).logits
    logits[:, PLAIN_TEXT["suppress_tokens"]] = -torch.inf
    assert logits[0].argmax() == tokens[0]
    assert logits[4:].argmax(dim=-1).tolist() == tokens[4:]


@pytest.mark.parametrize("info", METHODS, ids=case_id)
def test_packed_and_evicted_entries_can_be_taken_back_or_say_why_not(info: mmfast.MethodInfo) -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), one(family)
    with mmfast.accelerate(model, plan_of(info)):
        cache = generate(model, batch.inputs, 6).output.past_key_values
        length = cache.get_seq_length()
        before = {index: layer.stored for index, layer in enumerate(cache.layers)}
        refusal = None
        try:
            cache.crop(-1)
        except ValueError as error:
            refusal = str(error)
    if refusal is None:
        assert cache.get_seq_length() == length - 1
        # A token that was never remembered is not stored, and has not to go.
        assert all(before[index] - layer.stored in (0, 1) for index, layer in enumerate(cache.layers))
        assert cache.layers[0].stored == before[0] - 1
    else:
        assert "cannot take back 1 token" in refusal
        assert cache.get_seq_length() == length


EARLIER = [info for info in mmfast.methods() if info.stage in ("before_llm", "in_llm") and info.kind != "Compressor"]


@pytest.mark.parametrize("info", EARLIER, ids=case_id)
@pytest.mark.parametrize(
    "kept", ["snapkv(keep=0.5, window=4)", "lookm(keep=0.5)", "vl_cache(keep=0.5)", "int8(residual=2)"]
)
def test_with_every_method_before(info: mmfast.MethodInfo, kept: str) -> None:
    """Every way of shortening a prompt runs before a cache is shortened, and both show in the report."""
    family = FAMILIES["llava"]
    model, batch = family.model(), turn(family)
    plan = f"{info.name}(keep=0.6)" if "keep" in info.options else f"{info.name}()"
    with mmfast.accelerate(model, plan) as fast:
        generate(model, batch.inputs, 3)
        before = fast.report()
    with mmfast.accelerate(model, f"{plan} + {kept}") as fast:
        done = generate(model, batch.inputs, 3)
        report = fast.report()
    assert bool(done.logits.isfinite().all())
    assert report.tokens_per_layer == before.tokens_per_layer
    assert report.kv_bytes < before.kv_bytes


FIRST = [
    "divprune(keep=0.6)",
    "fastv(keep=0.6)",
    "mustdrop(keep=0.6, truncate_cache=True)",
    "p_mod(keep=0.6)",
    "saisa()",
]


@pytest.mark.parametrize("info", METHODS, ids=case_id)
@pytest.mark.parametrize("first", FIRST)
def test_with_every_method_of_the_cache(info: mmfast.MethodInfo, first: str) -> None:
    """In a batch as one by one."""
    family = FAMILIES["llava"]
    model, batch = family.model(), turn(family)
    with mmfast.accelerate(model, f"{first} + {plan_of(info)}"):
        together = generate(model, batch.inputs, 3)
        for row in range(2):
            alone = generate(model, batch.alone(row).inputs, 3)
            if info.kind != "Packer":
                assert (alone.logits[0] - together.logits[row]).abs().max() < CLOSE
    assert bool(together.logits.isfinite().all())


def entries_of(layer: LogicalLength) -> list[list[torch.Tensor]]:
    """The real keys of each head of each row, oldest first."""
    return [
        [keys[real].clone() for keys, real in zip(*heads, strict=True)]
        for heads in zip(layer.keys, layer.real_entries(), strict=True)
    ]


@pytest.mark.parametrize(
    "plan",
    [
        "snapkv(keep=0.4, window=4)",
        "snapkv(keep=0.4, window=4) + int8(residual=4)",
        "lookm(keep=0.4) + kivi(group=4, residual=4)",
        "calibquant()",
        "razor_attention(keep=0.4)",
    ],
)
def test_a_second_image_is_shortened_for_itself(plan: str) -> None:
    """The entries of the first stay what they are."""
    family = FAMILIES["llava"]
    model, first = family.model(), turn(family)
    with mmfast.accelerate(model, plan):
        answer = generate(model, first.inputs, 2)
        cache = answer.output.past_key_values
        before, count = entries_of(cache.layers[0]), cache.layers[0].stored
        second = family.batch([2, family.image(0, 5), 3], [2, family.image(0, 6), 3])
        ids = torch.cat([first.inputs["input_ids"], answer.tokens, second.inputs["input_ids"]], dim=1)
        mask = first.inputs["attention_mask"]
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        inputs = {**second.inputs, "input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        done = generate(model, inputs, 2)
        length = second.inputs["input_ids"].shape[1] + 1
    layer = cache.layers[0]
    # One token is read after the prompt; a method that only packs stores everything.
    assert count < layer.stored <= count + length + 1
    assert layer.stored < count + length + 1 or "calibquant" in plan
    if "+" not in plan:
        for heads, earlier in zip(entries_of(layer), before, strict=True):
            for own, old in zip(heads, earlier, strict=True):
                assert torch.equal(own[: len(old)], old)
    assert bool(done.logits.isfinite().all())
    assert (done.logits[0, 0] - answer.logits[0, 0]).abs().max() > FAR


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize(
    "plan", ["snapkv(keep=0.4, window=4)", "lookm(keep=0.4)", "h2o(keep=0.4)", "fastv(keep=0.6) + calibquant()"]
)
def test_with_the_masks_of_flash_attention(name: str, plan: str) -> None:
    family = FAMILIES[name]
    batch = turn(family)
    with mmfast.accelerate(family.model(), plan):
        wanted = generate(family.model(), batch.inputs, STEPS)
    with flash_on_cpu():
        model = family.model(FLASH)
        with mmfast.accelerate(model, plan):
            done = generate(model, batch.inputs, STEPS)
        for refused in ("razor_attention(keep=0.4)", "quest(keep=0.4)"):
            with pytest.raises(ValueError, match="has no mask for"):
                mmfast.accelerate(model, refused)
    assert (done.logits - wanted.logits).abs().max() < CLOSE
