"""generate() under a plan: every way of decoding gives what the reference gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from support.cases import case_id, mixed, one, two
from support.checks import CLOSE, STEPS, Generated, generate
from support.families import FAMILIES, Batch, Family
from support.prompts import IMAGE, VOCABULARY
from support.reference import decoder_inputs, expected

BEFORE, INSIDE = "divprune(keep=0.4)", "fastv(keep=0.4)"
BOTH = "uniform(keep=0.6) + pyramiddrop(keep=0.25)"
PLANS = [BEFORE, INSIDE, BOTH]
NO_SPECIAL_TOKENS = {"suppress_tokens": list(range(IMAGE, VOCABULARY))}
"""A placeholder that is generated and then read again would need an image."""

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
every_plan = pytest.mark.parametrize("plan", PLANS)


def pair(family: Family) -> Batch:
    """Two rows of different length with one image each, of different sizes."""
    return family.batch([2, family.image(0, 1), 3], [4, family.image(family.sizes - 1, 2), 5])


@every_family
@every_plan
def test_without_a_cache(family: Family, plan: str) -> None:
    """Every step reads the prompt again, yet what is dropped must stay what the prompt decided."""
    model, batch = family.model(), mixed(family)

    def both_ways() -> tuple[Generated, Generated]:
        return tuple(generate(model, batch.inputs, use_cache=way, **NO_SPECIAL_TOKENS) for way in (True, False))

    untouched = both_ways()
    if not torch.equal(untouched[0].tokens, untouched[1].tokens):
        pytest.skip("transformers reads generated tokens differently without a cache here, with no plan at work")
    with mmfast.accelerate(model, plan):
        cached, uncached = both_ways()
    assert torch.equal(cached.tokens, uncached.tokens)
    assert (cached.logits - uncached.logits).abs().max() < CLOSE


@every_family
@every_plan
def test_step_by_step_forward_equals_generate(family: Family, plan: str) -> None:
    model, batch = family.model(), mixed(family)
    with mmfast.accelerate(model, plan), torch.no_grad():
        done = generate(model, batch.inputs, 5)
        inputs = batch.inputs
        output = model(**inputs, use_cache=True)
        mask = inputs["attention_mask"]
        for step in range(5):
            assert (output.logits[:, -1] - done.logits[:, step]).abs().max() < CLOSE
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
            output = model(
                input_ids=done.tokens[:, step : step + 1],
                attention_mask=mask,
                past_key_values=output.past_key_values,
                **following(model, mask),
            )


def following(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Positions of the next token, which models with three-dimensional ones do not work out from a mask."""
    deltas = getattr(model.model, "rope_deltas", None)
    return {} if deltas is None else {"position_ids": (mask.sum(dim=1, keepdim=True) - 1 + deltas).expand(3, -1, -1)}


@every_family
@every_plan
@pytest.mark.parametrize("case", [pair, mixed], ids=["one-image", "uneven"])
def test_beams(family: Family, plan: str, case: Callable[[Family], Batch]) -> None:
    """The score of each beam is the sum of the reference's log-probabilities."""
    model, batch = family.model(), case(family)

    def off(plan: str) -> float:
        done = model.generate(
            **batch.inputs,
            max_new_tokens=STEPS,
            num_beams=3,
            num_return_sequences=2,
            do_sample=False,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return max(
            abs(float(_log_likelihood(batch.alone(number // 2), plan, own) - done.sequences_scores[number]))
            for number, own in enumerate(done.sequences[:, -STEPS:].tolist())
        )

    if off("full") > CLOSE:
        pytest.skip("transformers itself gives beams of this prompt the wrong images, with no plan at work")
    with mmfast.accelerate(model, plan):
        assert off(plan) < CLOSE


def _log_likelihood(row: Batch, plan: str, tokens: list[int]) -> Tensor:
    wanted = expected(row, plan, tokens[:-1])
    return wanted.logits.log_softmax(dim=-1)[range(len(tokens)), tokens].sum()


@every_family
@every_plan
def test_sampling_several_sequences(family: Family, plan: str) -> None:
    model, batch = family.model(), pair(family)

    def sample() -> Generated:
        torch.manual_seed(3)
        return generate(model, batch.inputs, do_sample=True, num_return_sequences=3)

    def off(done: Generated, plan: str) -> float:
        return max(
            float((logits - expected(batch.alone(number // 3), plan, own[:-1].tolist()).logits).abs().max())
            for number, (own, logits) in enumerate(zip(done.tokens, done.logits, strict=True))
        )

    if off(sample(), "full") > CLOSE:
        pytest.skip("transformers itself gives sequences of this prompt the wrong images, with no plan at work")
    with mmfast.accelerate(model, plan):
        done = sample()
        assert torch.equal(done.tokens, sample().tokens)
    assert len(done.tokens.unique(dim=0)) > 2
    assert off(done, plan) < CLOSE


@every_family
@every_plan
def test_prompt_lookup_gives_the_same_tokens(family: Family, plan: str) -> None:
    """Candidates are taken back out of the cache when they are wrong."""
    model = family.model()
    phrase = (11, 12, 13, 14, 15)
    batch = family.batch([2, family.image(), phrase, 2, phrase])
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    if not torch.equal(
        model.generate(**batch.inputs, max_new_tokens=STEPS, do_sample=False, **lookup)[:, -STEPS:],
        generate(model, batch.inputs).tokens,
    ):
        pytest.skip("transformers itself decodes this family differently with prompt lookup, with no plan at work")
    with mmfast.accelerate(model, plan):
        plain = generate(model, batch.inputs)
        lengths: list[int] = []
        with calls_of(model.model, lambda ids: lengths.append(ids.shape[1])):
            looked_up = model.generate(**batch.inputs, max_new_tokens=STEPS, do_sample=False, **lookup)
    # The first call already brings three drafted tokens after the prompt.
    assert lengths[0] == batch.inputs["input_ids"].shape[1] + 3
    assert torch.equal(looked_up[:, -STEPS:], plain.tokens)


@contextmanager
def calls_of(module: Any, note: Callable[[Tensor], None]) -> Iterator[None]:
    """Note the ids of every call of a module."""
    handle = module.register_forward_pre_hook(
        lambda module, args, kwargs: note(args[0] if args else kwargs["input_ids"]), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


@every_family
@every_plan
def test_embeddings_instead_of_ids(family: Family, plan: str) -> None:
    model, batch = family.model(), pair(family)
    inputs = batch.inputs
    with mmfast.accelerate(model, plan), torch.no_grad():
        plain = generate(model, inputs)
        positions = decoder_inputs(family.model("eager"), inputs).get("position_ids")
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        # Positions of several dimensions cannot be found without ids.
        explicit = {} if family.renumbers else {"position_ids": positions}
        logits = model(**inputs, **explicit, inputs_embeds=embeds).logits[:, -1]
        assert (logits - plain.logits[:, 0]).abs().max() < CLOSE
        if explicit or family.name == "paligemma":
            # generate() takes no embeddings here, or would count positions in one dimension.
            return
        generated = generate(model, {**inputs, "inputs_embeds": embeds})
    assert torch.equal(generated.tokens, plain.tokens)
    assert (generated.logits - plain.logits).abs().max() < CLOSE


@every_family
@every_plan
def test_generated_hidden_states(family: Family, plan: str) -> None:
    model, batch = family.model(), two(family)
    with mmfast.accelerate(model, plan):
        done = generate(model, batch.inputs, 3, output_hidden_states=True)
    length = batch.inputs["input_ids"].shape[1]
    states = done.output.hidden_states
    assert [step[-1].shape[1] for step in states] == [length, 1, 1]
    assert {layer.shape[1] for layer in states[0]} == {length}
    for step in range(3):
        assert torch.allclose(model.lm_head(states[step][-1][:, -1]), done.logits[:, step], atol=1e-5)


@every_family
def test_a_generated_placeholder_is_no_image(family: Family) -> None:
    model, batch = family.model(), one(family)
    force = {"suppress_tokens": [token for token in range(VOCABULARY) if token != IMAGE]}
    with mmfast.accelerate(model, BOTH) as fast:
        done = generate(model, batch.inputs, 4, **force)
        report = fast.report()
    assert done.tokens.tolist() == [[IMAGE] * 4]
    assert report.decode_steps == 3
    wanted = expected(batch, BOTH, [IMAGE] * 3)
    assert (done.logits[0] - wanted.logits).abs().max() < CLOSE
