"""A new question chooses anew, from features that were kept aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mmfast
from support.cases import case_id
from support.checks import CLOSE, FAR, Generated, census, generate, registries
from support.families import FAMILIES, Batch, Family
from support.prompts import IMAGE, VOCABULARY, text

STEPS = 3
PLAIN_TEXT = {"suppress_tokens": list(range(IMAGE, VOCABULARY))}
"""Untrained models would write placeholders, which have no features when they are read again."""
PLANS = ["snapkv(keep=0.4, window=4)", "fastv(keep=0.4)", "trim(keep=0.4) + vl_cache(keep=0.5)"]

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)


def turn(family: Family) -> Batch:
    return family.batch([3, family.image(0, 1), 4], [6, family.image(0, 2), 7])


def following(first: Batch, answer: Generated, asked: list[int]) -> dict[str, Any]:
    """What ``generate`` gets for the second question."""
    ids = torch.cat([first.inputs["input_ids"], answer.tokens, torch.tensor([asked] * 2)], dim=1)
    mask = first.inputs["attention_mask"]
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": answer.output.past_key_values}


def as_new(first: Batch, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same conversation as a prompt of its own, with its pictures."""
    length = inputs["input_ids"].shape[1]
    brought = {
        name: torch.nn.functional.pad(value, (0, length - value.shape[1])) if name.endswith("token_type_ids") else value
        for name, value in first.inputs.items()
    }
    return {**brought, "input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


@every_family
@pytest.mark.parametrize("plan", PLANS)
def test_the_new_question_chooses(family: Family, plan: str) -> None:
    model, first = family.model(), turn(family)
    stock, tables = census(model), registries()
    encoded = 0

    def note(*_: object) -> None:
        nonlocal encoded
        encoded += 1

    handle = model.get_encoder(modality="image").register_forward_hook(note)
    try:
        with mmfast.accelerate(model, plan, on_new_turn="reselect") as fast:
            answer = generate(model, first.inputs, STEPS, **PLAIN_TEXT)
            before = encoded
            inputs = following(first, answer, text(5, 9))
            seen = inputs["past_key_values"].get_seq_length()
            again = generate(model, inputs, STEPS, **PLAIN_TEXT)
            report = fast.report()
            assert encoded == before
            assert again.output.past_key_values is inputs["past_key_values"]
            said = torch.cat([answer.tokens, torch.tensor([text(5, 9)] * 2), again.tokens], dim=1)
            third = following(first, Generated(said, again.logits, again.output), text(3, 8))
            assert bool(generate(model, third, STEPS, **PLAIN_TEXT).logits.isfinite().all())
            assert encoded == before
    finally:
        handle.remove()
    assert report.reread_tokens == seen
    assert f"{seen} tokens of earlier turns read again" in str(report)
    with mmfast.accelerate(model, plan):
        fresh = generate(model, as_new(first, inputs), STEPS, **PLAIN_TEXT)
    assert torch.equal(again.tokens, fresh.tokens)
    assert (again.logits - fresh.logits).abs().max() < CLOSE
    assert census(model) == stock
    assert registries() == tables


@pytest.mark.parametrize("plan", PLANS[:2])
def test_reuse_goes_on_from_what_the_first_question_left(plan: str) -> None:
    family = FAMILIES["llava"]
    model, first = family.model(), turn(family)

    def second(policy: str) -> torch.Tensor:
        with mmfast.accelerate(model, plan, on_new_turn=policy):
            answer = generate(model, first.inputs, STEPS, **PLAIN_TEXT)
            return generate(model, following(first, answer, text(5, 9)), STEPS, **PLAIN_TEXT).logits

    assert (second("reuse") - second("reselect")).abs().max() > FAR


def test_plans_that_read_no_question_have_nothing_to_choose_anew() -> None:
    family = FAMILIES["llava"]
    model, first = family.model(), turn(family)
    with mmfast.accelerate(model, "divprune(keep=0.4)", on_new_turn="reselect") as fast:
        answer = generate(model, first.inputs, STEPS, **PLAIN_TEXT)
        generate(model, following(first, answer, text(5, 9)), STEPS, **PLAIN_TEXT)
        assert fast.report().reread_tokens == 0


def test_only_the_new_tokens_are_not_enough() -> None:
    family = FAMILIES["llava"]
    model, first = family.model(), turn(family)
    with mmfast.accelerate(model, "fastv(keep=0.4)", on_new_turn="reselect"):
        answer = generate(model, first.inputs, STEPS, **PLAIN_TEXT)
        with pytest.raises(ValueError, match="needs all of its tokens"):
            model.generate(torch.tensor([text(5, 9)] * 2), past_key_values=answer.output.past_key_values)
    with pytest.raises(ValueError, match=r"on_new_turn='forget' must be one of 'reuse', 'reselect'"):
        mmfast.accelerate(model, "fastv(keep=0.4)", on_new_turn="forget")
