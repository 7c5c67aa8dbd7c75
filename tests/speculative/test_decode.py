"""The loop behind ``generate``: the same answer, whatever is drafted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import mmfast
from support import cache_plans
from support.cases import CASES, case_id, mixed, one, text_only, two, video
from support.checks import census, registries
from support.drafters import registered
from support.families import FAMILIES, Batch, Family

STEPS = 20
SHAPES = (
    "num_draft=5",
    "wrong_after=2",
    "wrong_after=0",
    "wrong_after=1, gaps=True",
    'shape="tree"',
    'shape="tree", wrong_after=1, num_draft=3',
)


def plain(model: Any, batch: Batch, steps: int = STEPS, **options: Any) -> Any:
    """Generate without drafts."""
    options = {"do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**batch.inputs, max_new_tokens=steps, **options)


def answers(batch: Batch, output: Any) -> list[list[int]]:
    """Return the new tokens of each row."""
    found: list[list[int]] = output.sequences[:, batch.inputs["input_ids"].shape[1] :].tolist()
    return found


def differing(batch: Batch, found: Any, expected: Any) -> Iterator[float]:
    """Yield, for rows that differ, by how much the best logit leads the next one where they first do."""
    start = batch.inputs["input_ids"].shape[1]
    for row, (own, other) in enumerate(zip(found.sequences, expected.sequences, strict=True)):
        places = (own != other).nonzero().flatten().tolist()
        if places:
            best = expected.logits[places[0] - start][row].topk(2).values
            yield float(best[0] - best[1])


def drafted(model: Any, batch: Batch, known: list[list[int]], plan: str, **options: Any) -> tuple[Any, Any]:
    """Generate with an oracle that knows the answer."""
    with registered(known), mmfast.accelerate(model, plan) as fast:
        output = plain(model, batch, **options)
        return output, fast.report().drafting


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("family", "case"), CASES, ids=case_id)
def test_same_tokens_on_every_family(family: Family, case: Any, shape: str) -> None:
    model, batch = family.model(), case(family)
    expected = plain(model, batch, output_logits=True)
    found, record = drafted(model, batch, answers(batch, expected), f"oracle(adaptive_length=False, {shape})")
    for row in differing(batch, found, expected):
        # Two logits that rounding cannot tell apart: a forward of several rows may choose the other.
        assert row < 2e-6
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    assert record.emitted == (STEPS - 1) * len(batch.rows)
    assert record.accepted > 0 or "wrong_after=0" in shape


def plan_with(info: mmfast.MethodInfo) -> str:
    """Write a plan with one method, of the cache or of visual tokens."""
    if info.stage == "cache":
        return cache_plans.plan_of(info)
    return f"{info.name}({'keep=0.4' if 'keep' in info.options else ''})"


def check_under_plan(family: Family, batch: Batch, plan: str, shape: str) -> None:
    model = family.model()
    with mmfast.accelerate(model, plan):
        expected = plain(model, batch)
    found, record = drafted(model, batch, answers(batch, expected), f"{plan} + oracle(adaptive_length=False, {shape})")
    assert torch.equal(found.sequences, expected.sequences)
    assert record.accepted > 0


OTHERS = [
    info
    for info in mmfast.methods()
    # Those with compression tokens need a model that knows them.
    if info.stage in ("before_llm", "in_llm", "cache") and info.kind != "Compressor"
]
GOING_ON = {"h2o", "streaming_llm", "prefixkv", "spec_kv", "elastic_cache", "gamma_mod"}
"""Methods that evict after every generated token, or route each by itself."""


@pytest.mark.parametrize("shape", ["wrong_after=2", 'shape="tree"'])
@pytest.mark.parametrize("info", OTHERS, ids=case_id)
def test_same_tokens_with_every_other_method(info: mmfast.MethodInfo, shape: str) -> None:
    """The pruned or compressed model is the one whose answer must come out."""
    family = FAMILIES["llava"]
    goes_on = info.name in GOING_ON or info.kind == "Forgetter"
    with pytest.raises(ValueError, match=r"evicts after every|go around layers") if goes_on else nullcontext():
        check_under_plan(family, mixed(family), plan_with(info), shape)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_same_tokens_where_frames_were_chosen(name: str) -> None:
    family = FAMILIES[name]
    check_under_plan(family, video(family), "uniform_frames(keep=2) + divprune(keep=0.5)", "wrong_after=2")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "internvl"])
@pytest.mark.parametrize("shape", ["num_draft=5", 'shape="tree"', "wrong_after=1, gaps=True"])
@pytest.mark.parametrize(
    "plan",
    [
        "divprune(keep=0.3)",
        "fastv(layer=1, keep=0.3)",
        "pyramiddrop() + snapkv(keep=0.4, window=4)",
        "divprune(keep=0.5) + snapkv(keep=0.5, window=4) + kivi(residual=8, group=4)",
        "quest(keep=0.4, dense_layers=0, page_size=4)",
    ],
)
@pytest.mark.parametrize("case", [two, mixed], ids=case_id)
def test_same_tokens_under_plans(name: str, shape: str, plan: str, case: Any) -> None:
    check_under_plan(FAMILIES[name], case(FAMILIES[name]), plan, shape)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_of_every_token(name: str, attention: str) -> None:
    family = FAMILIES[name]
    model, batch = family.model(attention), mixed(family)
    expected = plain(model, batch, output_logits=True)
    for shape in ("num_draft=5", 'shape="tree"'):
        found, _ = drafted(
            model, batch, answers(batch, expected), f"oracle(adaptive_length=False, {shape})", output_logits=True
        )
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", [one, mixed, text_only], ids=case_id)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8, "temperature": 1.5},
        {"repetition_penalty": 1.3},
        {"num_return_sequences": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", ["num_draft=5", 'shape="tree"', "wrong_after=1, gaps=True"])
def test_same_seed_same_answer(case: Any, options: dict[str, Any], shape: str) -> None:
    """Sampled tokens too are those of plain decoding, one by one."""
    family = FAMILIES["llava"]
    model, batch = family.model(), case(family)
    torch.manual_seed(5)
    expected = plain(model, batch, do_sample=True, **options)
    torch.manual_seed(5)
    known = answers(batch, expected)
    found, record = drafted(model, batch, known, f"oracle(adaptive_length=False, {shape})", do_sample=True, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert record.accepted > 0


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 8, "eos_token_id": 5},
        {"suppress_tokens": [3, 4, 5]},
        {"bad_words_ids": [[7], [8, 9]]},
        {"forced_eos_token_id": 6},
        {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 6},
        {"sequence_bias": {(7,): 9.0}},
    ],
    ids=str,
)
def test_processors_see_what_they_would_see(options: dict[str, Any]) -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), mixed(family)
    expected = plain(model, batch, **options)
    for shape in ("num_draft=5", 'shape="tree"'):
        found, _ = drafted(model, batch, answers(batch, expected), f"oracle(adaptive_length=False, {shape})", **options)
        assert torch.equal(found.sequences, expected.sequences)


class Counting(LogitsProcessor):
    """A processor with a memory: it bans a token that depends on how often it was asked."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.lengths.append(input_ids.shape[1])
        return (
            scores.index_fill(1, torch.tensor([int(scores.argmax())]), -torch.inf) if len(self.lengths) % 3 else scores
        )


def test_processor_with_memory_is_asked_once_per_token() -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), one(family)
    first, second = Counting(), Counting()
    expected = plain(model, batch, logits_processor=LogitsProcessorList([first]))
    found, record = drafted(
        model,
        batch,
        answers(batch, expected),
        'oracle(adaptive_length=False, shape="tree")',
        logits_processor=LogitsProcessorList([second]),
    )
    assert torch.equal(found.sequences, expected.sequences)
    assert first.lengths == second.lengths
    assert record.accepted > 0


class StopsAt(StoppingCriteria):
    """End an answer with a pair of tokens."""

    def __init__(self, pair: list[int]) -> None:
        self.pair = pair

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return (input_ids[:, -2:] == torch.tensor(self.pair)).all(dim=1)


class Heard:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("shape", ["num_draft=6", 'shape="tree"'])
@pytest.mark.parametrize("place", [0, 1, 3, 6])
def test_stops_inside_a_draft(shape: str, place: int) -> None:
    """At a token that ends answers, at a criterion and at the longest answer; nothing comes after."""
    family = FAMILIES["llava"]
    model, batch = family.model(), one(family)
    (tokens,) = answers(batch, plain(model, batch))
    for options in (
        {"eos_token_id": tokens[place]},
        {"stopping_criteria": StoppingCriteriaList([StopsAt(tokens[place : place + 2])])},
        {"steps": place + 2},
    ):
        expected = plain(model, batch, **options)
        heard = Heard()
        found, _ = drafted(model, batch, [tokens], f"oracle(adaptive_length=False, {shape})", streamer=heard, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert heard.tokens == expected.sequences[0].tolist()
        assert heard.ended
        assert found.past_key_values.get_seq_length() == found.sequences.shape[1] - 1


@pytest.mark.parametrize("shape", ["num_draft=6", 'shape="tree"', "wrong_after=1, gaps=True"])
def test_rows_end_at_different_lengths(shape: str) -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), mixed(family)
    known = answers(batch, plain(model, batch))
    ends = [known[0][3], known[1][9]]
    expected = plain(model, batch, eos_token_id=ends, pad_token_id=0)
    found, _ = drafted(
        model, batch, known, f"oracle(adaptive_length=False, {shape})", eos_token_id=ends, pad_token_id=0
    )
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("plan", ["", "divprune(keep=0.4) + ", "snapkv(keep=0.5, window=4) + "])
@pytest.mark.parametrize("shape", ["num_draft=5", 'shape="tree"'])
def test_cache_is_that_of_plain_decoding(name: str, plan: str, shape: str) -> None:
    """A second question on the cache that rows of different speed leave behind gets the same answer."""
    family = FAMILIES[name]
    model, batch = family.model(), mixed(family)
    more = torch.tensor([[9, 8, 7]] * 3)

    def again(output: Any) -> Tensor:
        ids = torch.cat([output.sequences, more], dim=1)
        mask = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, STEPS + 3), value=1)
        with torch.no_grad():
            first = model(
                input_ids=ids[:, output.past_key_values.get_seq_length() :],
                attention_mask=mask,
                position_ids=_following(model, batch, output, ids),
                past_key_values=output.past_key_values,
            )
        return first.logits

    with mmfast.accelerate(model, plan.removesuffix(" + ") or "full"):
        expected = plain(model, batch)
        logits = again(expected)
    with (
        registered(answers(batch, expected)),
        mmfast.accelerate(model, f"{plan}oracle(adaptive_length=False, {shape})"),
    ):
        found = plain(model, batch)
        torch.testing.assert_close(again(found), logits, atol=2e-5, rtol=0)


def _following(model: Any, batch: Batch, output: Any, ids: Tensor) -> Tensor | None:
    """Positions of text after an answer; families with several dimensions count from the prompt."""
    seen = output.past_key_values.get_seq_length()
    deltas = getattr(model.base_model, "rope_deltas", None)
    mask = torch.nn.functional.pad(
        batch.inputs["attention_mask"], (0, ids.shape[1] - batch.inputs["input_ids"].shape[1]), value=1
    )
    places = (mask.cumsum(dim=1) - 1)[:, seen:]
    if deltas is None:
        return places
    return (places + deltas.view(-1, 1)).expand(3, -1, -1)


def test_right_drafts_take_the_fewest_rounds() -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), one(family)
    # What stands for images or padding is never drafted.
    options = {"suppress_tokens": [0, model.config.image_token_id]}
    known = answers(batch, plain(model, batch, **options))
    for length in (1, 3, 7):
        _, record = drafted(model, batch, known, f"oracle(adaptive_length=False, num_draft={length})", **options)
        assert record.rounds == -(-(STEPS - 1) // (length + 1))
        assert record.acceptance == [1.0] * len(record.acceptance)
        assert record.tokens_per_forward == pytest.approx((STEPS - 1) / record.rounds)
        assert record.mean_accepted == pytest.approx(record.tokens_per_forward - 1)


def test_stop_strings() -> None:
    model, processor = mmfast.load_default()
    batch = processor(text="<image>\nwhat color is the ring?", images=picture(), return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 30, "min_new_tokens": 20, "tokenizer": processor.tokenizer}
    expected = model.generate(**batch, **options)
    text = processor.tokenizer.decode(expected[0, batch["input_ids"].shape[1] :])
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    expected = model.generate(**batch, stop_strings=[stop], **options)
    known = expected[:, batch["input_ids"].shape[1] :].tolist()
    with registered(known), mmfast.accelerate(model, "oracle(adaptive_length=False)"):
        assert torch.equal(model.generate(**batch, stop_strings=[stop], **options), expected)


def picture() -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", (64, 64), "orange")


def test_remove_leaves_nothing() -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), mixed(family)
    known = answers(batch, plain(model, batch))
    before = census(model), registries(), model.generate
    drafted(model, batch, known, "oracle()")
    assert (census(model), registries()) == before[:2]
    assert model.generate == before[2]


class Broken(LogitsProcessor):
    """Fails in the middle of an answer."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 7:
            raise RuntimeError("broken on purpose")
        return scores


def test_goes_on_after_an_exception() -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), one(family)
    expected = plain(model, batch)
    known = answers(batch, expected)
    before = census(model), registries()
    with registered(known), mmfast.accelerate(model, "oracle(adaptive_length=False)"):
        with pytest.raises(RuntimeError, match="on purpose"):
            plain(model, batch, logits_processor=LogitsProcessorList([Broken()]))
        assert torch.equal(plain(model, batch).sequences, expected.sequences)
        with torch.no_grad():
            model(**batch.inputs)
    assert (census(model), registries()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "not for beam search"),
        ({"use_cache": False}, "use_cache"),
        ({"prompt_lookup_num_tokens": 3}, "not for assisted"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not possible"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states is not possible"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size is not possible"),
        ({"custom_generate": lambda model, **inputs: None}, "custom_generate cannot be given"),
        ({"guidance_scale": 1.5}, "whole batches"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_what_it_cannot_do(options: dict[str, Any], message: str) -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), one(family)
    expected = plain(model, batch)
    with registered(answers(batch, expected)), mmfast.accelerate(model, "oracle()"):
        with pytest.raises(ValueError, match=message):
            model.generate(**batch.inputs, max_new_tokens=4, **options)
        assert torch.equal(plain(model, batch).sequences, expected.sequences)


@pytest.mark.parametrize("plan", ["h2o(keep=0.5)", "streaming_llm(keep=0.5)"])
def test_refuses_evictions_that_go_on(plan: str) -> None:
    model = FAMILIES["llava"].model()
    with registered([]), pytest.raises(ValueError, match="evicts after every generated token"):
        mmfast.accelerate(model, f"{plan} + oracle()")


def test_one_drafter_per_plan() -> None:
    with registered([]), pytest.raises(ValueError, match="both act at stage 'decode'"):
        mmfast.Plan.parse("oracle() + oracle(num_draft=2)")
