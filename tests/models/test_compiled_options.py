"""Compiled decoding does what ``generate`` is told, keeps the rules of the house, and really compiles."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlavaForConditionalGeneration, TextStreamer
from transformers.generation.stopping_criteria import StoppingCriteria

import mmfast
from mmfast.adapters import compiled_step
from support.cases import case_id, mixed, one, two
from support.checks import CLOSE, census, generate, registries
from support.compiled_steps import BOTH, STEPS, answers, both, check_alike
from support.families import FAMILIES, Family

NAMES = ["llava", "qwen2_5_vl", "gemma3"]

some_families = pytest.mark.parametrize("family", [FAMILIES[name] for name in NAMES], ids=case_id)
llava = FAMILIES["llava"]


@pytest.fixture(autouse=True)
def uncompiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run steps as they are, unless a test is about compiling."""
    if "compiler" not in request.fixturenames:
        monkeypatch.setattr(compiled_step, "compiled", lambda step: step)


# ---------------------------------------------------------------- what generate() is told


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
        {"num_return_sequences": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["plain", "warped", "several", "penalised"],
)
def test_sampling_takes_the_same_chances(options: dict[str, Any]) -> None:
    def sample(model: Any) -> Tensor:
        torch.manual_seed(5)
        return answers(model, mixed(llava), do_sample=True, **options)

    expected, found = both(llava.model(), BOTH, sample)
    assert torch.equal(expected, found)
    assert not torch.equal(found[: len(mixed(llava))], answers(llava.model(), mixed(llava)))


@pytest.mark.parametrize("processed", [False, True], ids=["inside", "outside"])
def test_rows_end_where_they_end(processed: bool) -> None:
    """Each row ends at a token of its own, and is filled up; the step knows that, and so does the host."""
    model, batch = llava.model(), mixed(llava)
    free = answers(model, batch)[:, -STEPS:]
    ends = [int(free[0, 2]), int(free[1, 5]), int(free[2, 7])]
    options: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": 3}
    if processed:
        options["temperature"], options["do_sample"], options["top_k"] = 1.0, True, 1
    expected, found = both(model, "full", lambda model: answers(model, batch, **options))
    assert torch.equal(expected, found)
    assert found.shape[1] < batch.inputs["input_ids"].shape[1] + STEPS


def test_the_cache_ends_with_the_answer() -> None:
    """Also where the last row ends before the others could know."""
    model, batch = llava.model(), one(llava)
    ends = {"eos_token_id": int(answers(model, batch)[0, -6]), "return_dict_in_generate": True}
    expected, found = both(model, BOTH, lambda model: answers(model, batch, **ends))
    assert torch.equal(expected.sequences, found.sequences)
    assert expected.past_key_values.get_seq_length() == found.past_key_values.get_seq_length()
    assert expected.past_key_values.layers[-1].keys.shape == found.past_key_values.layers[-1].keys.shape


def test_a_single_token_needs_no_step() -> None:
    with mmfast.accelerate(llava.model(), BOTH, compile=True) as fast:
        done = generate(llava.model(), one(llava).inputs, 1)
        record = fast.report().compilation
    assert record is not None
    assert (record.steps, record.seconds) == (0, 0.0)
    with mmfast.accelerate(llava.model(), BOTH):
        check_alike(generate(llava.model(), one(llava).inputs, 1), done)


class _StopsAfter(StoppingCriteria):
    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, ids: Tensor, scores: Any, **options: Any) -> Tensor:
        self.calls -= 1
        return torch.full((ids.shape[0],), self.calls <= 0)


def test_stopping_criteria_are_asked_for_each_token() -> None:
    expected, found = both(
        llava.model(), BOTH, lambda model: answers(model, one(llava), stopping_criteria=[_StopsAfter(5)])
    )
    assert torch.equal(expected, found)
    assert found.shape[1] == one(llava).inputs["input_ids"].shape[1] + 5


def test_stop_strings() -> None:
    model, processor = mmfast.load_default()
    tokenizer = processor.tokenizer
    batch = tokenizer(["a red circle and"], return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "tokenizer": tokenizer}
    whole = model.generate(**batch, **options)[0, batch["input_ids"].shape[1] :]
    stop = tokenizer.decode(whole[4:6])
    expected, found = both(model, "full", lambda model: model.generate(**batch, stop_strings=[stop], **options))
    assert torch.equal(expected, found)
    assert found.shape[1] < batch["input_ids"].shape[1] + 12


@pytest.mark.parametrize("explicit", [False, True], ids=["own", "explicit"])
@pytest.mark.parametrize("plan", ["full", "prompt_lookup()"])
def test_stop_strings_of_the_models_own_config(plan: str, explicit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the config of a call is filled up from it, and where those of a call go before; it stays as it was."""
    model, processor = mmfast.load_default()
    tokenizer = processor.tokenizer
    batch = tokenizer(["a red circle and"], return_tensors="pt")
    # The little model would say one word again and again.
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 1}

    def told() -> dict[str, Any]:
        return {"generation_config": GenerationConfig(**settings)} if explicit else settings

    prompt = batch["input_ids"].shape[1]
    whole = model.generate(**batch, **told())[0, prompt:]
    stops = [tokenizer.decode(whole[4:6]), tokenizer.decode(whole[7:9])]
    monkeypatch.setattr(model.generation_config, "stop_strings", stops[:1])
    with mmfast.accelerate(model, plan, compile=plan == "full"):
        found = model.generate(**batch, tokenizer=tokenizer, **told())
        later = model.generate(**batch, tokenizer=tokenizer, stop_strings=stops[1:], **settings)
        with pytest.raises(ValueError, match="tokenizer"):
            model.generate(**batch, **told())
    assert torch.equal(found, model.generate(**batch, tokenizer=tokenizer, **told()))
    assert torch.equal(later, model.generate(**batch, tokenizer=tokenizer, stop_strings=stops[1:], **settings))
    assert prompt < found.shape[1] < later.shape[1] < prompt + 12
    assert model.generation_config.stop_strings == stops[:1]


class _Collector(TextStreamer):
    def __init__(self, breaks_at: int | None = None) -> None:
        self.seen: list[list[int]] = []
        self.ended = False
        self.breaks_at = breaks_at

    def put(self, value: Tensor) -> None:
        self.seen.append(value.flatten().tolist())
        if len(self.seen) == self.breaks_at:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended = True


def test_streaming() -> None:
    def stream(model: Any) -> _Collector:
        collector = _Collector()
        answers(model, one(llava), streamer=collector)
        return collector

    expected, found = both(llava.model(), BOTH, stream)
    assert expected.seen == found.seen
    assert found.ended


def test_scores_and_logits() -> None:
    options = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "top_k": 5}

    def run(model: Any) -> Any:
        torch.manual_seed(1)
        return answers(model, mixed(llava), do_sample=True, **options)

    expected, found = both(llava.model(), BOTH, run)
    for name in ("scores", "logits"):
        pairs = list(zip(getattr(expected, name), getattr(found, name), strict=True))
        assert len(pairs) == STEPS
        for one_step, other in pairs:
            finite = one_step.isfinite()
            assert torch.equal(finite, other.isfinite())
            assert (one_step[finite] - other[finite]).abs().max() < CLOSE


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beams"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"use_cache": False}, "use_cache"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ],
    ids=["beams", "lookup", "no-cache", "hidden-states"],
)
def test_what_is_not_compiled_decodes_as_ever(
    options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = llava.model(), one(llava)
    with mmfast.accelerate(model, BOTH):
        expected = answers(model, batch, **options)
    with caplog.at_level(logging.WARNING), mmfast.accelerate(model, BOTH, compile=True) as fast:
        found = [answers(model, batch, **options) for _ in range(2)]
        record = fast.report().compilation
    assert record is not None
    assert reason in record.failure
    # Said once, not at every call.
    assert caplog.text.count(reason) == 1
    for again in found:
        plain = isinstance(again, Tensor)
        assert torch.equal(again if plain else again.sequences, expected if plain else expected.sequences)


# ------------------------------------------------------------------------- house rules


@pytest.mark.parametrize(
    ("plan", "method"),
    [
        ("h2o(keep=0.4)", "h2o"),
        ("int8()", "int8"),
        ("divprune(keep=0.5) + kivi()", "kivi"),
        ("quest(keep=0.4)", "quest"),
        ("dynamic_llava_decode()", "dynamic_llava_decode"),
        ("gamma_mod()", "gamma_mod"),
    ],
)
def test_refused_where_decode_steps_decide(plan: str, method: str) -> None:
    model = llava.model()
    before = census(model)
    with pytest.raises(ValueError, match=rf"{method}.*leave compile=True out"):
        mmfast.accelerate(model, plan, compile=True)
    assert census(model) == before


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_only_true_and_false(value: Any) -> None:
    with pytest.raises(TypeError, match="compile="):
        mmfast.accelerate(llava.model(), "full", compile=value)


@some_families
def test_nothing_is_left_behind(family: Family) -> None:
    model = family.model()
    before, tables = census(model), registries()
    untouched = generate(model, two(family).inputs, 4)
    with mmfast.accelerate(model, BOTH, compile=True):
        answers(model, mixed(family))
    assert census(model) == before
    assert registries() == tables
    again = generate(model, two(family).inputs, 4)
    assert torch.equal(untouched.logits, again.logits)


def test_an_interrupted_answer() -> None:
    """Ctrl-C between tokens leaves a cache that knows what was read, and a model that works."""
    model, batch = llava.model(), one(llava)
    with mmfast.accelerate(model, BOTH):
        expected = answers(model, batch)
    with mmfast.accelerate(model, BOTH, compile=True):
        with pytest.raises(KeyboardInterrupt):
            answers(model, batch, streamer=_Collector(breaks_at=6))
        assert torch.equal(answers(model, batch), expected)


def test_hooks_of_others_are_heeded(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = llava.model(), one(llava)
    layer = model.get_decoder().layers[2]
    seen: list[int] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(1))
    try:
        with caplog.at_level(logging.WARNING), mmfast.accelerate(model, "full", compile=True):
            answers(model, batch)
    finally:
        handle.remove()
    assert len(seen) == STEPS
    assert "has a hook of its own" in caplog.text


def test_steps_are_kept_for_the_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    prepare = compiled_step.Stepper._prepared

    def noted(self: Any, step: Any, states: Any) -> Any:
        made.append(states)
        return prepare(self, step, states)

    monkeypatch.setattr(compiled_step.Stepper, "_prepared", noted)
    model = llava.model()
    with mmfast.accelerate(model, "full", compile=True) as fast:
        first = answers(model, one(llava))
        assert torch.equal(answers(model, llava.batch([3, llava.image(), 4])), first)
        longer = answers(model, llava.batch([3, llava.image(0, 4), 9]))
        assert len(made) == 1
        with fast.suspended():
            assert torch.equal(answers(model, one(llava)), first)
            assert torch.equal(answers(model, llava.batch([3, llava.image(0, 4), 9])), longer)
        assert torch.equal(answers(model, one(llava)), first)
        # A new shape of batch is made once, and a mode of inference is no new shape.
        assert len(made) == 1
        with torch.inference_mode():
            answers(model, mixed(llava))
        answers(model, mixed(llava))
        assert len(made) == 2


def test_a_changed_model_is_compiled_anew() -> None:
    model = LlavaForConditionalGeneration(llava.config()).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with mmfast.accelerate(model, "full", compile=True):
        answers(model, one(llava), 3)
        # A copy: what follows changes the weights, and the other model is shared by all tests.
        model.get_decoder().layers[1].mlp = copy.deepcopy(llava.model().get_decoder().layers[1].mlp)
        for weight in model.parameters():
            weight.data = weight.data.clone() * 2
        found = answers(model, one(llava))
    assert torch.equal(found, answers(model, one(llava)))


def test_a_step_that_does_not_compile_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(step: Any) -> Any:
        def run(*args: Any) -> None:
            raise RuntimeError("no compiler found")

        return run

    monkeypatch.setattr(compiled_step, "compiled", broken)
    model = llava.model()
    with caplog.at_level(logging.WARNING), mmfast.accelerate(model, BOTH, compile=True) as fast:
        found = answers(model, one(llava))
        answers(model, mixed(llava))
        report = fast.report()
    assert report.compilation is not None
    assert report.compilation.failure == "RuntimeError: no compiler found"
    assert "steps ran uncompiled: RuntimeError: no compiler found" in str(report)
    assert caplog.text.count("no compiler found") == 1
    with mmfast.accelerate(model, BOTH):
        assert torch.equal(answers(model, one(llava)), found)


def test_report_and_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of compiling stand alone, and measuring keeps the option."""
    model = llava.model()
    prepare = compiled_step.Stepper._prepared

    def slow(self: Any, step: Any, states: Any) -> Any:
        found = prepare(self, step, states)
        self.seconds += 1000.0
        return found

    monkeypatch.setattr(compiled_step.Stepper, "_prepared", slow)
    with mmfast.accelerate(model, BOTH, compile=True) as fast:
        answers(model, one(llava))
        report = fast.report()
        assert report.compilation is not None
        assert report.compilation.seconds >= 1000
        # Taken out of the time of decoding, in which it was spent.
        assert report.seconds["decode"] == 0.0
        assert report.decode_steps == report.compilation.steps == STEPS - 1
        assert "steps ran compiled" in str(report)
        assert report.to_dict()["compilation"]["steps"] == STEPS - 1
        fast.measure(one(llava).inputs, max_new_tokens=3, repeats=1)
        answers(model, one(llava))
        assert fast.report().compilation.seconds == 0.0
    with mmfast.accelerate(model, BOTH) as plain:
        answers(model, one(llava))
        assert plain.report().compilation is None


def test_drafting_goes_its_own_way() -> None:
    """The rounds of a drafter run as they do without compile=True."""
    model, batch = llava.model(), one(llava)
    with mmfast.accelerate(model, "prompt_lookup()"):
        expected = answers(model, batch)
    with mmfast.accelerate(model, "prompt_lookup()", compile=True) as fast:
        assert torch.equal(answers(model, batch), expected)
        assert fast.report().drafting is not None
        assert "the rounds of 'prompt_lookup' are not compiled" in str(fast.report())


# ------------------------------------------------------------------------------ compiled


@pytest.fixture
def compiler() -> None:
    """Let a test compile."""


def _traced(family: Family, monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    """Trace without gaps, run prompts of several lengths, and see that only another batch is traced anew."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(compiled_step, "compiled", lambda step: torch.compile(step, fullgraph=True, backend="eager"))
    model = family.model()
    longer = family.batch([3, family.image(0, 1), 60, family.image(0, 2), 90])
    with mmfast.accelerate(model, plan):
        expected = [answers(model, batch) for batch in (one(family), longer, mixed(family))]
    before = counters["stats"]["unique_graphs"]
    with mmfast.accelerate(model, plan, compile=True) as fast:
        assert torch.equal(answers(model, one(family)), expected[0])
        assert counters["stats"]["unique_graphs"] == before + 1
        assert torch.equal(answers(model, longer), expected[1])
        assert counters["stats"]["unique_graphs"] == before + 1
        assert torch.equal(answers(model, mixed(family)), expected[2])
        assert fast.report().compilation.failure == ""
    assert counters["stats"]["unique_graphs"] == before + 2


def test_llava_is_traced_without_gaps(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    _traced(llava, monkeypatch, "full")


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f is not llava], ids=case_id)
def test_every_family_is_traced_without_gaps(compiler: None, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    _traced(family, monkeypatch, "full")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "plan"), [("llava", BOTH), ("qwen2_5_vl", "snapkv(keep=0.4, window=4)")])
def test_compiled_for_this_processor(compiler: None, name: str, plan: str) -> None:
    family = FAMILIES[name]
    for case in (one, two):
        expected, found = both(family.model(), plan, lambda model, case=case: answers(model, case(family)))
        assert torch.equal(expected, found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_captured_on_a_gpu(compiler: None, name: str) -> None:
    family = FAMILIES[name]
    model = family.model().cuda()
    try:
        with torch.no_grad():
            inputs = [{key: value.cuda() for key, value in case(family).inputs.items()} for case in (one, two, mixed)]

        def tell(model: Any) -> list[Tensor]:
            return [model.generate(**own, max_new_tokens=STEPS, do_sample=False) for own in (*inputs, inputs[0])]

        expected, found = both(model, BOTH, tell)
        for one_answer, other in zip(expected, found, strict=True):
            assert torch.equal(one_answer, other)
    finally:
        model.cpu()
