"""Several turns on one cache: the second reads what the first kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast.plan import PlanLike
from mmfast.token_pruning.layers import LayerRequest
from support.cases import case_id
from support.checks import CLOSE, FAR, Generated, generate
from support.families import FAMILIES, Batch, Family
from support.prompts import IMAGE, VOCABULARY, Media, Piece, left_padded, text, tokens
from support.reference import expected
from support.trials import EVENTS, Detour, Trial, Window

BEFORE, INSIDE = "divprune(keep=0.4)", "fastv(keep=0.4)"
BOTH = "uniform(keep=0.6) + pyramiddrop(keep=0.25)"
PLANS = [BEFORE, 'uniform(keep=0.4, positions="keep")', INSIDE, BOTH]
STEPS = 4
PLAIN_TEXT = {"suppress_tokens": list(range(IMAGE, VOCABULARY))}
"""A placeholder among the answers would need an image when it is read again."""

INSIDE_PLANS = {
    "merge": [
        Trial(merge=True, needs=frozenset({"attention"}), asks=tuple(LayerRequest(layer - 1) for layer in EVENTS))
    ],
    "ahead": [Trial(needs=frozenset({"attention"}), asks=tuple(LayerRequest(layer, ahead=True) for layer in EVENTS))],
    "truncate": [Trial(cuts=((1, 0, 1), (3, 1, 3), (4, 3, 4)))],
    "skip": [Detour()],
    "freeze": [Detour(bypass="freeze")],
    "attention": [Detour(bypass="attention")],
    "mask": [Window()],
}
"""Everything else that methods inside the language model may do."""

every_plan = pytest.mark.parametrize("plan", PLANS)
every_family_and_kind_of_plan = pytest.mark.parametrize(
    ("family", "plan"),
    [(family, plan) for family in FAMILIES.values() for plan in PLANS]
    + [
        pytest.param(FAMILIES[name], plan, id=f"{name}-{kind}")
        for name in ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3")
        for kind, plan in INSIDE_PLANS.items()
    ],
    ids=case_id,
)
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)


def first_turn(family: Family) -> Batch:
    return family.batch([2, family.image(0, 1), 3], [4, family.image(family.sizes - 1, 2), 5])


def second_turn(first: Batch, answers: Tensor, *pieces: Sequence[Piece]) -> tuple[Batch, dict[str, Tensor]]:
    """Append the answers and more pieces to each row; the inputs bring the features of the new pieces alone.

    What is appended must be equally long in each row: padding stays at the very left.
    """
    family = first.family
    rows = [
        (*own, tuple(answer), *(piece if isinstance(piece, Media) else tuple(text(piece, 9)) for piece in more))
        for own, answer, more in zip(first.rows, answers.tolist(), pieces, strict=True)
    ]
    batch = Batch(family, tuple(rows), first.seeds)
    new = family.batch(*pieces)
    ids = [tokens(row, seed) for row, seed in zip(rows, first.seeds, strict=True)]
    inputs = {
        "input_ids": left_padded(ids),
        "attention_mask": left_padded([[1] * len(row) for row in ids]),
        **family.token_inputs(ids),
        **(family.join(new.media) if any(new.media) else {}),
    }
    return batch, inputs


def largest_error(done: Generated, batch: Batch, plan: PlanLike, turns: Any = None) -> float:
    worst = 0.0
    for row in range(len(batch)):
        wanted = expected(batch.alone(row), plan, done.tokens[row, :-1].tolist(), turns and turns[row])
        worst = max(worst, float((done.logits[row] - wanted.logits).abs().max()))
    return worst


@every_family_and_kind_of_plan
def test_a_second_question(family: Family, plan: PlanLike) -> None:
    model, first = family.model(), first_turn(family)

    def run(plan: PlanLike) -> tuple[float, Tensor]:
        with mmfast.accelerate(model, plan):
            answer = generate(model, first.inputs, STEPS)
            asked = [text(5, 9)] * 2
            ids = torch.cat([first.inputs["input_ids"], answer.tokens, torch.tensor(asked)], dim=1)
            mask = torch.cat([first.inputs["attention_mask"], torch.ones(2, STEPS + 5, dtype=torch.int64)], dim=1)
            done = generate(
                model,
                {"input_ids": ids, "attention_mask": mask, "past_key_values": answer.output.past_key_values},
                STEPS,
            )
        worst = 0.0
        for row in range(2):
            given = [*answer.tokens[row].tolist(), *asked[row], *done.tokens[row, :-1].tolist()]
            wanted = expected(first.alone(row), plan, given).logits[STEPS + 5 :]
            worst = max(worst, float((done.logits[row] - wanted).abs().max()))
        return worst, done.logits

    error, untouched = run("full")
    if error > CLOSE:
        pytest.skip("transformers itself does not continue this family's cache, with no plan at work")
    error, logits = run(plan)
    assert error < CLOSE
    assert (logits[:, 0] - untouched[:, 0]).abs().max() > FAR


def encoded_ahead(model: Any, batch: Batch, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Positions in three dimensions need the grids of all images, features are wanted of the new ones alone."""
    if "image_grid_thw" not in inputs:
        return inputs
    with torch.no_grad():
        features = model.model.get_image_features(
            inputs.pop("pixel_values"), inputs.pop("image_grid_thw"), return_dict=True
        )
    grids = batch.family.join(batch.media)["image_grid_thw"]
    return {**inputs, "image_grid_thw": grids, "mm_encoder_outputs": {"image": features}}


@every_family_and_kind_of_plan
def test_a_second_image(family: Family, plan: PlanLike) -> None:
    model, first = family.model(), first_turn(family)
    more = [[2, family.image(family.sizes - 1, 3), 3], [2, family.image(family.sizes - 1, 4), 3]]

    def run(plan: PlanLike) -> float:
        with mmfast.accelerate(model, plan) as fast:
            answer = generate(model, first.inputs, STEPS, **PLAIN_TEXT)
            batch, inputs = second_turn(first, answer.tokens, *more)
            inputs = encoded_ahead(model, batch, inputs)
            done = generate(model, {**inputs, "past_key_values": answer.output.past_key_values}, STEPS)
            report = fast.report()
        turns = [
            [(0, len(old)), (len(old) + STEPS - 1, len(ids))] for old, ids in zip(first.ids, batch.ids, strict=True)
        ]
        # The report speaks of the second prompt alone.
        assert plan == "full" or [record.row for record in report.media].count(0) == len(batch.media[0][-1].layouts)
        return largest_error(done, batch, plan, turns)

    try:
        untouched = run("full")
    except (ValueError, TypeError):
        pytest.skip("transformers itself cannot take a second image of this family through generate()")
    if untouched > CLOSE:
        pytest.skip("transformers itself reads a second image of this family differently, with no plan at work")
    assert run(plan) < CLOSE


@every_family_and_kind_of_plan
def test_an_image_after_a_text_turn(family: Family, plan: PlanLike) -> None:
    """The cache was filled before anything was dropped, with padding among its tokens."""
    model = family.model()
    first = family.batch([6], [9])
    more = [[2, family.image(family.sizes - 1, 3), 3], [2, family.image(family.sizes - 1, 4), 3]]

    def run(plan: PlanLike) -> float:
        with mmfast.accelerate(model, plan):
            answer = generate(model, first.inputs, STEPS, **PLAIN_TEXT)
            batch, inputs = second_turn(first, answer.tokens, *more)
            inputs = encoded_ahead(model, batch, inputs)
            done = generate(model, {**inputs, "past_key_values": answer.output.past_key_values}, STEPS)
        turns = [[(len(old) + STEPS - 1, len(ids))] for old, ids in zip(first.ids, batch.ids, strict=True)]
        return largest_error(done, batch, plan, turns)

    try:
        untouched = run("full")
    except (ValueError, TypeError):
        pytest.skip("transformers itself cannot take an image of this family in a second turn through generate()")
    if untouched > CLOSE:
        pytest.skip("transformers itself reads a late image of this family differently, with no plan at work")
    assert run(plan) < CLOSE


def continued(model: Any, batch: Batch, done: Generated, asked: list[int], cache: Any) -> Generated:
    """Ask the second question on a cache."""
    rows = len(batch)
    length = done.tokens.shape[1] + len(asked)
    ids = torch.cat([batch.inputs["input_ids"], done.tokens, torch.tensor([asked] * rows)], dim=1)
    mask = torch.cat([batch.inputs["attention_mask"], torch.ones(rows, length, dtype=torch.int64)], dim=1)
    return generate(model, {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}, STEPS)


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "idefics3"])
@every_plan
def test_a_copied_cache_goes_its_own_way(name: str, plan: str) -> None:
    family = FAMILIES[name]
    model, first = family.model(), first_turn(family)
    with mmfast.accelerate(model, plan):
        answer = generate(model, first.inputs, STEPS)
        cache = answer.output.past_key_values
        other = copy.deepcopy(cache)
        one = continued(model, first, answer, [20, 21, 22], cache)
        two = continued(model, first, answer, [20, 21, 22], other)
    assert torch.equal(one.logits, two.logits)


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3"])
@every_plan
def test_generated_tokens_are_taken_back(name: str, plan: str) -> None:
    family = FAMILIES[name]
    model, first = family.model(), first_turn(family)
    with mmfast.accelerate(model, plan):
        answer = generate(model, first.inputs, STEPS)
        cache = answer.output.past_key_values
        # The last token was never read: the cache ends with the one before it.
        cache.crop(-2)
        kept = Generated(answer.tokens[:, : STEPS - 3], answer.logits, answer.output)
        done = continued(model, first, kept, [20, 21, 22], cache)
        length = first.inputs["input_ids"].shape[1]
        assert cache.get_seq_length() == length + STEPS - 3 + 3 + STEPS - 1
    for row in range(2):
        given = [*kept.tokens[row].tolist(), 20, 21, 22, *done.tokens[row, :-1].tolist()]
        wanted = expected(first.alone(row), plan, given).logits[STEPS - 3 + 3 :]
        assert (done.logits[row] - wanted).abs().max() < CLOSE


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@every_plan
def test_a_pruned_prompt_cannot_be_taken_back(name: str, plan: str) -> None:
    family = FAMILIES[name]
    model, first = family.model(), first_turn(family)
    with mmfast.accelerate(model, plan):
        cache = generate(model, first.inputs, 2).output.past_key_values
        with pytest.raises(ValueError, match="cannot take back 20 tokens: the cache holds a pruned prompt"):
            cache.crop(-20)


@every_family
@every_plan
def test_a_pruned_cache_needs_its_plan(family: Family, plan: str) -> None:
    """Masks and positions follow what was dropped; without a plan the answer would be silently wrong."""
    model, first = family.model(), first_turn(family)
    with mmfast.accelerate(model, plan):
        answer = generate(model, first.inputs, STEPS)
        other = copy.deepcopy(answer.output.past_key_values)
        wanted = continued(model, first, answer, [20, 21, 22], answer.output.past_key_values)
    with pytest.raises(ValueError, match="can only be continued while a plan is at work on the model"):
        continued(model, first, answer, [20, 21, 22], copy.deepcopy(other))
    with mmfast.accelerate(model, "uniform()"):
        done = continued(model, first, answer, [20, 21, 22], other)
    assert torch.equal(done.logits, wanted.logits)
