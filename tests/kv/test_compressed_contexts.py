"""Compressed media that are kept: read once, asked often, stored, and put one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmfast
from support.cases import case_id
from support.checks import CLOSE, generate
from support.compressing import COUNT, compressing, marks
from support.families import FAMILIES, Batch, Family
from support.prompts import VOCO, text

DISTINCT = ("llava", "llava_next", "qwen2_5_vl", "internvl", "gemma3")
every = pytest.mark.parametrize("family", [FAMILIES[name] for name in DISTINCT], ids=case_id)
PLAN = "voco()"
QUESTIONS = [text(3, 11), text(6, 12), text(1, 13)]
STEPS = 4


def media(family: Family, seed: int = 0) -> Batch:
    """An image and its compression tokens, as a prompt begins."""
    return family.batch([1, family.image(0, seed), marks()])


def fresh(family: Family, question: list[int]) -> list[int]:
    """Answer one question in a run of its own."""
    batch = family.batch([1, family.image(0, 0), marks(), tuple(question)])
    with mmfast.accelerate(family.model(), PLAN):
        return generate(family.model(), batch.inputs, STEPS).tokens[0].tolist()


@every
def test_one_reading_answers_as_fresh_runs_do(family: Family) -> None:
    with compressing(family):
        context = mmfast.SharedContext(family.model(), media(family).inputs, PLAN)
        whole = mmfast.SharedContext(family.model(), media(family).inputs)
        answers = context.ask(QUESTIONS, max_new_tokens=STEPS, eos_token_id=[])
        assert answers == [fresh(family, question) for question in QUESTIONS]
        assert answers != whole.ask(QUESTIONS, max_new_tokens=STEPS, eos_token_id=[])
        # What is kept is the compression tokens, in every layer.
        assert {layer.keys.shape[1] for layer in context._prefix.layers} == {COUNT}
        back = context.ask(QUESTIONS[::-1], max_new_tokens=STEPS, eos_token_id=[])
    assert back[::-1] == answers


@every
def test_compressed_media_are_kept_on_disk(family: Family, tmp_path: Path) -> None:
    with compressing(family):
        context = mmfast.SharedContext(family.model(), media(family).inputs, PLAN)
        context.save(tmp_path / "image.safetensors")
        again = mmfast.SharedContext.load(tmp_path / "image.safetensors", family.model())
        answers = context.ask(QUESTIONS, max_new_tokens=STEPS, eos_token_id=[])
        assert again.ask(QUESTIONS, max_new_tokens=STEPS, eos_token_id=[]) == answers
        assert again.kv_bytes == context.kv_bytes
        # What is stored can still be put beside others.
        pair = mmfast.SharedContext.joined([again, context])
        assert pair.ask(QUESTIONS, max_new_tokens=2) == mmfast.SharedContext.joined([context, again]).ask(
            QUESTIONS, max_new_tokens=2
        )


def reference(family: Family, seed: int, first: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of an image's compression tokens, read at positions at which the first of them stands at one.

    Rotary attention knows distances alone, so that the whole prompt may be read somewhere else.
    """
    batch, model = media(family, seed), family.model()
    inputs = batch.inputs
    places = (inputs["input_ids"][0] == VOCO).nonzero().flatten()

    def move(module: object, args: object, kwargs: dict[str, Tensor]) -> tuple[object, dict[str, Tensor]]:
        given = kwargs.get("position_ids")
        given = torch.arange(inputs["input_ids"].shape[1])[None] if given is None else given
        return args, {**kwargs, "position_ids": given - given[..., int(places[0])].max() + first}

    handle = model.get_decoder().register_forward_pre_hook(move, with_kwargs=True)
    try:
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
    finally:
        handle.remove()
    found = []
    for layer in cache.layers:
        gone = inputs["input_ids"].shape[1] - layer.keys.shape[2]
        found.append((layer.keys[0][:, places - gone], layer.values[0][:, places - gone]))
    return found


@every
def test_joined_frames_stand_at_consecutive_positions(family: Family) -> None:
    seeds = [3, 1, 2]
    with compressing(family):
        frames = [mmfast.SharedContext(family.model(), media(family, seed).inputs, PLAN) for seed in seeds]
        video = mmfast.SharedContext.joined(frames)
        wanted = [reference(family, seed, 1 + number * COUNT) for number, seed in enumerate(seeds)]
    assert video._prefix.start == 1 + COUNT * len(seeds)
    for index, layer in enumerate(video._prefix.layers):
        assert layer.slots.tolist() == list(range(1, 1 + COUNT * len(seeds)))
        keys, values = (torch.cat([frame[index][part] for frame in wanted], dim=1) for part in (0, 1))
        assert (layer.keys - keys).abs().max() < CLOSE
        assert (layer.values - values).abs().max() < CLOSE
    # Time order is part of what is read, and the frames themselves are as they were.
    with compressing(family):
        other = mmfast.SharedContext.joined(frames[::-1])
    assert (other._prefix.layers[1].keys - video._prefix.layers[1].keys).abs().max() > 0.1
    assert {layer.keys.shape[1] for frame in frames for layer in frame._prefix.layers} == {COUNT}


@every
def test_one_context_joined_alone_answers_the_same(family: Family) -> None:
    """Moving everything by the same distance changes nothing."""
    with compressing(family):
        context = mmfast.SharedContext(family.model(), media(family).inputs, PLAN)
        alone = mmfast.SharedContext.joined([context])
    asked = {"max_new_tokens": STEPS, "eos_token_id": []}
    assert alone.ask(QUESTIONS, **asked) == context.ask(QUESTIONS, **asked)  # type: ignore[arg-type]


def test_the_paper_s_form_keeps_what_stands_before_the_image() -> None:
    family = FAMILIES["llava"]
    with compressing(family):
        plan = 'voco(hide_prefix="visual")'
        context = mmfast.SharedContext(family.model(), media(family).inputs, plan)
        assert {layer.keys.shape[1] for layer in context._prefix.layers} == {1 + COUNT}
        joined = mmfast.SharedContext.joined([context, context])
    assert joined._prefix.layers[0].slots.tolist() == list(range(2 + 2 * COUNT))


def test_what_cannot_be_joined_is_refused() -> None:
    family = FAMILIES["qwen2_5_vl"]
    with compressing(family):
        with pytest.raises(ValueError, match="at least one context"):
            mmfast.SharedContext.joined([])
        image = mmfast.SharedContext(family.model(), media(family).inputs, PLAN)
        # Visual tokens of this family have three positions each.
        whole = mmfast.SharedContext(family.model(), media(family).inputs)
        with pytest.raises(ValueError, match="one position of its own"):
            mmfast.SharedContext.joined([image, whole])
        other = FAMILIES["llava"]
        with compressing(other):
            strange = mmfast.SharedContext(other.model(), media(other).inputs, PLAN)
        with pytest.raises(ValueError, match="models of different weights"):
            mmfast.SharedContext.joined([image, strange])
