"""A second model drafts: one that sees the images, or any language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mmfast
from mmfast.adapters import binding
from mmfast.adapters.companion import VisionReading
from mmfast.registry import get
from mmfast.speculative.base import Request
from support.against_plain import STEPS, check, decoded, rounds_when_right, unsaid
from support.cases import case_id, mixed, one, text_only, video
from support.checks import census
from support.companions import CHOSEN, clone, language_model, other
from support.families import FAMILIES, Batch, Family
from support.prompts import VOCABULARY

ASSISTANT = "assistant(adaptive_length=False, num_draft=4)"


# ------------------------------------------------------------------------------- sees the images


@pytest.mark.parametrize("case", [one, mixed, text_only], ids=case_id)
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_a_clone_is_always_right(family: Family, case: Any) -> None:
    """It would not be if it did not see the images, or stood at a wrong place after a round."""
    batch = case(family)
    record = check(batch, ASSISTANT, draft_model=clone(family), **unsaid(family.model()))
    assert record.acceptance_rate == 1.0
    assert record.rounds == rounds_when_right(4, len(batch))


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.has_video], ids=case_id)
def test_a_clone_sees_videos(family: Family) -> None:
    record = check(video(family).alone(0), ASSISTANT, draft_model=clone(family), **unsaid(family.model()))
    assert record.acceptance_rate == 1.0


def test_another_image_means_another_draft() -> None:
    """A clone that is shown other pixels than the model is wrong about them."""
    family = FAMILIES["llava"]
    model, assistant = family.model(), clone(family)
    generate = assistant.generate

    def elsewhere(**inputs: Any) -> Any:
        return generate(**{**inputs, "pixel_values": torch.flip(inputs["pixel_values"], dims=(-1,))})

    assistant.generate = elsewhere
    record = check(one(family), ASSISTANT, draft_model=assistant, **unsaid(model))
    assert record.acceptance_rate < 0.9


@pytest.mark.parametrize("case", [one, mixed], ids=case_id)
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_a_model_that_errs_changes_nothing(family: Family, case: Any) -> None:
    """What was refused leaves no trace in the cache of the assistant: what follows is right as often as at first."""
    record = check(case(family), ASSISTANT, draft_model=other(family), steps=30)
    assert 0 < record.accepted < record.drafted


@pytest.mark.parametrize("beside", ["divprune(keep=5)", "fastv(layer=1, keep=3)", "snapkv(keep=8)"])
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_beside_other_methods(family: Family, beside: str) -> None:
    check(mixed(family), ASSISTANT, beside=beside, draft_model=other(family))


@pytest.mark.parametrize(
    "plan", ["divprune(keep=5)", "fastv(layer=1, keep=3)", "divprune(keep=8) + fastv(layer=1, keep=3)"]
)
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_a_clone_under_the_same_plan_is_always_right(family: Family, plan: str) -> None:
    assistant = f"assistant(adaptive_length=False, num_draft=4, plan={plan!r})"
    record = check(mixed(family), assistant, beside=plan, draft_model=clone(family), **unsaid(family.model()))
    assert record.rounds == rounds_when_right(4, 3)


def test_stop_strings_of_an_assistant_are_not_asked_for() -> None:
    """When to stop is for the model to say; the assistant is given no tokenizer."""
    family = FAMILIES["llava"]
    assistant = clone(family)
    assistant.generation_config.stop_strings = ["stop"]
    assert check(one(family), ASSISTANT, draft_model=assistant, **unsaid(family.model())).acceptance_rate == 1.0
    assert assistant.generation_config.stop_strings == ["stop"]


def test_a_pruned_assistant_sees_less() -> None:
    family, plan = FAMILIES["llava"], "assistant(adaptive_length=False, num_draft=4, plan='divprune(keep=2)')"
    assert check(one(family), plan, draft_model=clone(family), **unsaid(family.model())).acceptance_rate < 0.9


def test_long_ragged_answers() -> None:
    """Holes are closed in both caches along the way."""
    family = FAMILIES["llava"]
    record = check(mixed(family), ASSISTANT, draft_model=other(family), steps=110)
    assert record.accepted > 0


def test_adaptive_lengths() -> None:
    """Rows that go without a draft for a while are caught up on."""
    family = FAMILIES["qwen2_5_vl"]
    check(mixed(family), "assistant(num_draft=4)", draft_model=other(family), steps=60)


def test_several_answers_to_one_prompt() -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), mixed(family)
    with mmfast.accelerate(model, ASSISTANT, draft_model=clone(family)) as fast:
        torch.manual_seed(0)
        first = decoded(model, batch, do_sample=True, num_return_sequences=2)
        assert fast.report().drafting.accepted > 0.8 * fast.report().drafting.drafted
        torch.manual_seed(0)
        assert torch.equal(decoded(model, batch, do_sample=True, num_return_sequences=2), first)
    assert len(first) == 6


def test_positional_input_ids() -> None:
    family = FAMILIES["llava"]
    model, inputs = family.model(), one(family).inputs
    ids = inputs.pop("input_ids")
    with mmfast.accelerate(model, ASSISTANT, draft_model=clone(family)) as fast:
        model.generate(ids, **inputs, max_new_tokens=STEPS, do_sample=False, **unsaid(model))
        assert fast.report().drafting.acceptance_rate == 1.0


def second_turn(model: Any, batch: Batch, **inputs: Any) -> Tensor:
    """Answer, and answer a second question with the cache of the first."""
    options = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": STEPS, **unsaid(model)}
    first = model.generate(**batch.inputs, **options)
    question = torch.randint(10, 100, (len(batch), 4), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([first.sequences, question], dim=1)
    mask = batch.inputs["attention_mask"]
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    kept = first.past_key_values
    found: Tensor = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=kept, **inputs, **options
    ).sequences
    return found


@pytest.mark.parametrize("case", [one, mixed], ids=case_id)
@pytest.mark.parametrize("family", CHOSEN, ids=case_id)
def test_later_turns_are_read_again(family: Family, case: Any) -> None:
    model, batch = family.model(), case(family)
    expected = second_turn(model, batch)
    with mmfast.accelerate(model, ASSISTANT, draft_model=clone(family)) as fast:
        assert torch.equal(second_turn(model, batch), expected)
        assert fast.report().drafting.acceptance_rate == 1.0


def test_images_that_are_not_known_are_not_guessed() -> None:
    """The first turn was written without the assistant: it proposes nothing."""
    family = FAMILIES["llava"]
    model, batch = family.model(), one(family)
    expected = second_turn(model, batch)
    with mmfast.accelerate(model, ASSISTANT, draft_model=clone(family)) as fast:
        companion = fast._binding.loop.companion
        read = companion.read

        def forgetting(request: Request) -> VisionReading | None:
            if "pixel_values" not in request.inputs:
                companion._media = {}
            found: VisionReading | None = read(request)
            return found

        companion.read = forgetting
        assert torch.equal(second_turn(model, batch), expected)
        assert fast.report().drafting.drafted == 0


# ------------------------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("plan", [ASSISTANT, "assistant(plan='fastv(layer=1, keep=3)')"])
def test_nothing_is_left_on_either_model(plan: str) -> None:
    family = FAMILIES["qwen2_5_vl"]
    model, assistant = family.model(), clone(family)
    decoded(assistant, one(family), steps=2)
    before = census(model), census(assistant)
    fast = mmfast.accelerate(model, plan, draft_model=assistant)
    decoded(model, one(family))
    assert census(assistant) != before[1]
    fast.remove()
    assert (census(model), census(assistant)) == before


def test_a_draft_that_breaks_off_leaves_nothing() -> None:
    family = FAMILIES["llava"]
    model, assistant = family.model(), clone(family)
    decoded(assistant, one(family), steps=2)
    before, expected = (census(model), census(assistant)), decoded(model, one(family))
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise RuntimeError("broken")

    with mmfast.accelerate(model, ASSISTANT, draft_model=assistant):
        at_work = census(model), census(assistant)
        handle = assistant.get_decoder().layers[2].register_forward_pre_hook(count)
        with pytest.raises(RuntimeError, match="broken"):
            decoded(model, one(family))
        handle.remove()
        assert (census(model), census(assistant)) == at_work
        assert torch.equal(decoded(model, one(family)), expected)
    assert (census(model), census(assistant)) == before


def test_a_plan_can_be_taken_off_for_a_while() -> None:
    family = FAMILIES["llava"]
    model, assistant = family.model(), clone(family)
    fast = mmfast.accelerate(model, ASSISTANT, draft_model=assistant)
    with fast.suspended():
        assert not hasattr(vars(model).get("generate"), "__wrapped__")
    decoded(model, one(family), **unsaid(model))
    assert fast.report().drafting.acceptance_rate == 1.0
    fast.remove()


def test_a_plan_is_replaced_by_one_with_the_same_assistant() -> None:
    """What the first plan did to the assistant goes with it, and nobody else's plan does."""
    family = FAMILIES["llava"]
    model, assistant = family.model(), clone(family)
    decoded(model, one(family), steps=2)
    decoded(assistant, one(family), steps=2)
    before = census(model), census(assistant)
    first = mmfast.accelerate(model, "assistant()", draft_model=assistant)
    at_work = census(model), census(assistant)
    with pytest.raises(ValueError, match=r"this model already runs the plan 'assistant\(\)'"):
        mmfast.accelerate(model, ASSISTANT, draft_model=assistant)
    with pytest.raises(ValueError, match="draft_model already runs the plan 'full'"):
        mmfast.accelerate(FAMILIES["vipllava"].model(), "assistant()", draft_model=assistant, replace=True)
    assert (census(model), census(assistant)) == at_work
    both = f"divprune(keep=5) + {ASSISTANT}"
    second = mmfast.accelerate(model, both, draft_model=assistant, replace=True)
    assert (first.active, second.active) == (False, True)
    found = decoded(model, one(family))
    second.remove()
    assert (census(model), census(assistant)) == before
    with mmfast.accelerate(model, "divprune(keep=5)"):
        assert torch.equal(found, decoded(model, one(family)))


def test_a_failed_replacement_leaves_the_assistant_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llava"]
    model, assistant = family.model(), clone(family)
    decoded(assistant, one(family), steps=2)
    before = census(model), census(assistant)

    def refuse(*_: Any) -> None:
        raise ValueError("no tap")

    with mmfast.accelerate(model, ASSISTANT, draft_model=assistant) as first:
        decoded(model, one(family), **unsaid(model))
        monkeypatch.setattr(binding, "register_tap", refuse)
        with pytest.raises(ValueError, match="no tap"):
            mmfast.accelerate(model, "fastv()", replace=True)
        decoded(model, one(family), **unsaid(model))
        assert first.active
        assert first.report().drafting.acceptance_rate == 1.0
        assert first.report().drafting.rounds == rounds_when_right(4)
    assert (census(model), census(assistant)) == before


# --------------------------------------------------------------------------------------- refusals


def refused(model: Any, plan: str, draft_model: Any, message: str, kind: type[Exception] = ValueError) -> None:
    before = census(model)
    with pytest.raises(kind, match=message):
        mmfast.accelerate(model, plan, draft_model=draft_model)
    assert census(model) == before


def test_what_does_not_fit_is_refused() -> None:
    family = FAMILIES["llava"]
    model = family.model()
    refused(model, "assistant()", None, "pass it to accelerate\\(\\) as draft_model")
    refused(model, "text_draft()", None, "pass it to accelerate\\(\\) as draft_model")
    refused(model, "divprune(keep=4)", clone(family), "the plan has no drafter")
    refused(model, "swift()", clone(family), "'swift' drafts without one")
    refused(model, "assistant()", model, "is the model itself")
    refused(model, "text_draft()", model, "is the model itself")
    refused(model, "assistant()", "small", "must be a Hugging Face model, got str", TypeError)
    refused(model, "assistant()", language_model(), "drafts in 'text_draft\\(\\)'", TypeError)
    refused(model, "text_draft()", language_model(VOCABULARY // 2), "64 tokens and the model 128")
    refused(model, "text_draft()", model.get_decoder(), "has no output layer")


def test_other_placeholders_are_refused() -> None:
    family = FAMILIES["llava"]
    assistant = clone(family)
    assistant.config.image_token_id = 99
    refused(family.model(), "assistant()", assistant, "marks images by token 99, the model by 120")


def test_an_accelerated_assistant_is_refused() -> None:
    family = FAMILIES["llava"]
    assistant = clone(family)
    with mmfast.accelerate(assistant, "divprune(keep=4)"):
        refused(family.model(), "assistant()", assistant, "draft_model already runs the plan 'divprune")


def test_a_plan_the_assistant_cannot_run_is_refused() -> None:
    family = FAMILIES["llava_next"]
    refused(family.model(), "assistant(plan='downsample()')", clone(family), "cannot resize pictures")


def test_another_number_of_tokens_per_image_is_refused() -> None:
    """Both models are named, and the model itself goes on working."""
    family = FAMILIES["llava"]
    config = family.config()
    config.vision_config.image_size = 16
    small = transformers.LlavaForConditionalGeneration(config).eval()
    model = family.model()
    with mmfast.accelerate(model, "assistant()", draft_model=small) as fast:
        with pytest.raises(ValueError, match=r"draft_model Llava\w+ cannot read what was made for Llava\w+: "):
            decoded(model, one(family))
        assert decoded(model, text_only(family)).shape[0] == 2
        fast.remove()


def test_embeddings_without_ids_are_refused() -> None:
    family = FAMILIES["llava"]
    model = family.model()
    embeds = model.get_input_embeddings()(text_only(family).alone(0).inputs["input_ids"])
    with (
        mmfast.accelerate(model, "assistant()", draft_model=clone(family)),
        pytest.raises(ValueError, match="lets draft_model read input_ids"),
    ):
        model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("assistant", {"num_draft": 0}, "num_draft=0 must be"),
        ("assistant", {"risk": 2}, "risk=2 must be"),
        ("assistant", {"plan": "divprine(keep=4)"}, "unknown method 'divprine'"),
        ("assistant", {"plan": "divprune(keep=0)"}, "keep=0 must be"),
        ("assistant", {"plan": "snapkv()"}, "'snapkv' acts at stage 'cache'"),
        ("assistant", {"plan": "divprune() + swift()"}, "'swift' acts at stage 'decode'"),
        ("text_draft", {"num_draft": True}, "num_draft=True must be"),
        ("text_draft", {"risk": -0.5}, "risk=-0.5 must be"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get(name).method(**options)


def test_a_plan_is_text() -> None:
    with pytest.raises(TypeError, match="must be text"):
        get("assistant").method(plan=3)
    plan = mmfast.Plan.parse("assistant(plan='divprune(keep=4) + fastv(layer=1)')")
    assert mmfast.Plan.parse(plan.to_text()) == plan
