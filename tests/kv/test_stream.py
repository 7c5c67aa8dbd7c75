"""A video that keeps arriving: memory stays flat, and what is answered is what the entries that are left give."""

from __future__ import annotations

import gc
import resource
import threading

import pytest
import torch

import mmfast
from support.cases import one
from support.checks import census, generate, registries
from support.families import FAMILIES, Family
from support.prompts import padded, text

PLAIN = ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "mistral3"]
"""Families whose second images transformers itself reads as the first."""
QUESTIONS = [text(3, 11), text(5, 12)]


def turns(family: Family, count: int) -> list[dict[str, torch.Tensor]]:
    """Clips of one image each, the first after some text."""
    return [family.batch([3 if turn == 0 else 1, family.image(0, turn), 1]).inputs for turn in range(count)]


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_evicted_is_one_long_prompt(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    pieces = [3, family.image(0, 0), 1, 1, family.image(0, 1), 1]
    whole = family.batch(pieces).inputs
    with mmfast.VideoStream(model, "infinipot_v(keep=10000)") as stream:
        for inputs in turns(family, 2):
            stream.add(inputs)
        answers = stream.ask(QUESTIONS, max_new_tokens=4, eos_token_id=[])
        assert stream.seen == sum(inputs["input_ids"].shape[1] for inputs in turns(family, 2))
    ids = torch.cat([inputs["input_ids"] for inputs in turns(family, 2)], dim=1)
    context = mmfast.SharedContext(model, {**whole, "input_ids": ids})
    assert answers == context.ask(QUESTIONS, max_new_tokens=4, eos_token_id=[])


@pytest.mark.parametrize("name", [*PLAIN, "llava_onevision", "gemma3", "paligemma", "video_llava"])
@pytest.mark.parametrize(
    "plan", ["infinipot_v(keep=20)", "streammem(keep=20)", "knorm(keep=20)", "uniform(keep=0.5) + keydiff(keep=20)"]
)
def test_the_cache_stays_within_its_budget(name: str, plan: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    stock, tables = census(model), registries()
    with mmfast.VideoStream(model, plan) as stream:
        sizes = []
        for inputs in turns(family, 5):
            stream.add(inputs)
            sliding = [layer.is_sliding for layer in stream._stream.cache.layers]
            assert max(held for held, slides in zip(stream.held, sliding, strict=True) if not slides) <= 20
            sizes.append(stream.kv_bytes)
        first = stream.ask(QUESTIONS, max_new_tokens=3)
        assert stream.kv_bytes == sizes[-1]
        assert stream.ask(QUESTIONS, max_new_tokens=3) == first
        stream.add(turns(family, 1)[0])
    assert census(model) == stock
    assert registries() == tables


def test_one_clip_is_evicted_as_a_prompt_is() -> None:
    """Methods that read keys and values alone choose the same of the visual entries."""
    family = FAMILIES["llava"]
    model, inputs = family.model(), one(FAMILIES["llava"]).inputs
    with mmfast.VideoStream(model, "knorm(keep=6)") as stream:
        stream.add(inputs)
        streamed = stream._stream.cache.layers
    with mmfast.accelerate(model, 'knorm(keep=6, entries="visual")'):
        cache = generate(model, inputs, 1).output.past_key_values
    for own, other in zip(streamed, cache.layers, strict=True):
        assert torch.equal(own.places, other.places)
        assert (own.keys - other.keys).abs().max() < 1e-5


def test_two_thousand_frames_in_flat_memory() -> None:
    family = FAMILIES["llava"]
    model = family.model()
    frames = [1, *(family.image(0, seed) for seed in range(8))]
    with mmfast.VideoStream(model, "infinipot_v(keep=64)") as stream:
        sizes, peaks = [], []
        for _ in range(250):
            stream.add(family.batch(frames).inputs)
            sizes.append(stream.kv_bytes)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        gc.collect()
        assert max(stream.held) == 64
        assert len(stream.ask(QUESTIONS, max_new_tokens=2)) == 2
    # One token of text per clip stays; nothing else grows.
    growth = (sizes[-1] - sizes[9]) / (len(sizes) - 10)
    with mmfast.accelerate(model, "full") as fast:
        shape = fast.report().shape
    assert growth <= shape.kv_bytes([1] * shape.layers, 4) * 1.5
    # Kilobytes: a cache of all 2000 frames would take 40 MB.
    assert peaks[-1] - peaks[24] < 8_000


def test_watching_is_adding_one_after_the_other() -> None:
    family = FAMILIES["llava"]
    model = family.model()
    with mmfast.VideoStream(model, "infinipot_v(keep=20)") as stream:
        for inputs in turns(family, 4):
            stream.add(inputs)
        expected = stream.ask(QUESTIONS, max_new_tokens=3), stream.held, stream.seen
    threads: list[threading.Thread] = []

    def prepare(turn: int) -> dict[str, torch.Tensor]:
        threads.append(threading.current_thread())
        return turns(family, 4)[turn]

    with mmfast.VideoStream(model, "infinipot_v(keep=20)") as stream:
        assert stream.watch(range(4), prepare) == 4
        assert (stream.ask(QUESTIONS, max_new_tokens=3), stream.held, stream.seen) == expected
    assert len(set(threads)) == 1
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()


def test_watching_stops_at_an_error_after_the_clips_before_it() -> None:
    family = FAMILIES["llava"]
    with mmfast.VideoStream(family.model(), "knorm(keep=20)") as stream:
        with pytest.raises(IndexError):
            stream.watch(range(4), lambda turn: turns(family, 2)[turn])
        assert stream.seen == sum(inputs["input_ids"].shape[1] for inputs in turns(family, 2))
        assert all(thread.name != "mmfast-prefetch" for thread in threading.enumerate())


def test_plans_that_cannot_keep_up_are_refused() -> None:
    model = FAMILIES["llava"].model()
    for plan, reason in (
        ("divprune(keep=8)", "exactly one method of the cache"),
        ("infinipot_v(keep=0.5)", r"keep=0.5 of 'infinipot_v' must be a count"),
        ("h2o(keep=8)", "cannot keep up with a stream"),
        ("vl_cache(keep=8)", "cannot keep up with a stream"),
        ("expected_attention(keep=8)", "which a stream does not keep"),
        ("knorm(keep=8) + int8()", "exactly one method of the cache"),
    ):
        with pytest.raises(ValueError, match=reason):
            mmfast.VideoStream(model, plan)
    with mmfast.VideoStream(model, "knorm(keep=8)") as stream:
        with pytest.raises(ValueError, match="nothing has been added"):
            stream.ask(QUESTIONS)
        two = FAMILIES["llava"].batch([1, FAMILIES["llava"].image()], [2, FAMILIES["llava"].image()])
        with pytest.raises(ValueError, match="inputs hold 2 prompts"):
            stream.add(two.inputs)
        with pytest.raises(ValueError, match=r"attention_mask calls 2 of \d+ tokens padding, .* without padding"):
            stream.add(padded(one(FAMILIES["llava"]).inputs))
        assert stream.seen == 0
    stream.close()
    with pytest.raises(ValueError, match="has been closed"):
        stream.add(one(FAMILIES["llava"]).inputs)
