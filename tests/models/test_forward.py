"""One forward pass under a plan: with and without a cache, every attention implementation, every option."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import mmfast
from support.cases import CASES, case_id, mixed, two
from support.checks import CLOSE, FAR, census, check_against_reference, first_logits
from support.families import FAMILIES, Batch, Family
from support.flash import FLASH, flash_on_cpu
from support.prompts import TEXT
from support.reference import expected

BEFORE, INSIDE = "divprune(keep=0.4)", "fastv(keep=0.4)"
BOTH = "uniform(keep=0.6) + pyramiddrop(keep=0.25)"
PLANS = [BEFORE, "pool2d(keep=0.4)", INSIDE, BOTH]
Case = Callable[[Family], Batch]

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
every_case = pytest.mark.parametrize(("family", "case"), CASES, ids=case_id)


@pytest.fixture(scope="module", autouse=True)
def _flash() -> Iterator[None]:
    with flash_on_cpu():
        yield


def skips_pool(family: Family, case: Case, plan: str) -> bool:
    """Frames of Video-LLaVA are no grids; that pool2d says so is part of the contract."""
    return "pool2d" in plan and family.name == "video_llava" and case.__name__ == "video"


CASES_AND_PLANS = [
    (family, case, plan) for family, case in CASES for plan in PLANS if not skips_pool(family, case, plan)
]


@pytest.mark.parametrize(("family", "case", "plan"), CASES_AND_PLANS, ids=case_id)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_forward_equals_the_reference(family: Family, case: Case, plan: str, use_cache: bool) -> None:
    """Here the vision tower runs inside the call, not ahead of it as in generate()."""
    model, batch = family.model(), case(family)
    with mmfast.accelerate(model, plan) as fast, torch.no_grad():
        logits = model(**batch.inputs, use_cache=use_cache).logits
        report = fast.report()
    assert logits.shape[:2] == batch.inputs["input_ids"].shape
    for row in range(len(batch)):
        wanted = expected(batch.alone(row), plan)
        assert report.tokens_per_layer[row] == [len(alive) for alive in wanted.alive]
        assert (logits[row, -1] - wanted.logits[0]).abs().max() < CLOSE


@every_case
@pytest.mark.parametrize("plan", [BEFORE, INSIDE, BOTH])
def test_logits_keep_the_length_of_the_prompt(family: Family, case: Case, plan: str) -> None:
    """Each place has the logits of the nearest surviving token at or before it."""
    model, batch = family.model(), case(family)
    with mmfast.accelerate(model, plan), torch.no_grad():
        logits = model(**batch.inputs).logits
    for row in range(len(batch)):
        wanted = expected(batch.alone(row), plan)
        own = logits[row, -len(batch.ids[row]) :]
        entered, left = wanted.alive[0], wanted.alive[-1]
        for place in range(int(left[0]), len(own)):
            nearest = left[left <= place][-1]
            source = wanted.inner[int((entered == nearest).nonzero())]
            assert (own[place] - source).abs().max() < CLOSE


@every_case
@pytest.mark.parametrize("attention", ["eager", FLASH])
@pytest.mark.parametrize("plan", [BEFORE, 'divprune(keep=0.4, positions="keep")', INSIDE, BOTH])
def test_other_attention_implementations(family: Family, case: Case, attention: str, plan: str) -> None:
    if attention == FLASH and family.window:
        model, stock = family.model(attention), census(family.model(attention))
        with pytest.raises(ValueError, match="measures sliding windows by what is stored"):
            mmfast.accelerate(model, plan)
        assert census(model) == stock
        return
    check_against_reference(case(family), plan, attention)


OPTIONS = [
    'uniform(keep=0.4, positions="keep")',
    'uniform(keep=0.4, positions="compact")',
    'fastv(keep=0.4, positions="keep")',
    'fastv(keep=0.4, positions="compact")',
    'pyramiddrop(keep=0.3, positions="compact")',
    'uniform(keep=0.7, positions="compact") + pyramiddrop(keep=0.3, positions="compact")',
    'uniform(keep=0.7, positions="keep") + fastv(keep=0.2, positions="compact")',
    'fastv(keep=0.4, scope="per_image")',
    'fastv(keep=3, scope="per_image")',
    'pyramiddrop(keep=6, scope="per_image")',
    "pyramiddrop(keep=9)",
    "pyramiddrop(keep=0.5, layers=(1, 3), fractions=(0.6, 0.1))",
    "fastv(keep=1, layer=1)",
    "fastv(keep=0.4, layer=4)",
    "uniform(keep=1)",
]


@pytest.mark.parametrize(
    ("family", "plan"),
    [(family, plan) for family in FAMILIES.values() for plan in OPTIONS if family.renumbers or "compact" not in plan],
    ids=case_id,
)
def test_options(family: Family, plan: str) -> None:
    check_against_reference(mixed(family), plan)


@pytest.mark.parametrize("policy", ["keep_nonempty", "keep", "drop"])
@pytest.mark.parametrize("name", ["llava_next", "llava_next_video", "llava_onevision"])
@pytest.mark.parametrize("method", ["uniform", "pool2d"])
def test_newline_policies(name: str, policy: str, method: str) -> None:
    check_against_reference(mixed(FAMILIES[name]), f"{method}(keep=2, newline={policy!r})")


@every_family
@pytest.mark.parametrize("plan", [BEFORE, INSIDE])
def test_right_padding(family: Family, plan: str) -> None:
    """What a data loader for training makes; the last real token decides."""
    model, batch = family.model(), mixed(family)
    inputs, padded = batch.inputs, {}
    lengths = inputs["attention_mask"].sum(dim=1)
    for name, value in inputs.items():
        runs_along = value.ndim == 2 and value.shape == inputs["input_ids"].shape
        padded[name] = (
            torch.stack([row.roll(int(length)) for row, length in zip(value, lengths, strict=True)])
            if runs_along
            else value
        )
    with mmfast.accelerate(model, plan), torch.no_grad():
        logits = model(**padded).logits
    for row, length in enumerate(lengths.tolist()):
        wanted = expected(batch.alone(row), plan)
        assert (logits[row, length - 1] - wanted.logits[0]).abs().max() < CLOSE


@every_family
def test_attention_mask_may_be_left_out(family: Family) -> None:
    model, batch = family.model(), two(family)
    inputs = {name: value for name, value in batch.inputs.items() if name != "attention_mask"}
    with mmfast.accelerate(model, BOTH):
        logits = first_logits(model, inputs)
    assert (logits[0] - expected(batch, BOTH).logits[0]).abs().max() < CLOSE


@every_family
@pytest.mark.parametrize("plan", [BEFORE, INSIDE])
def test_hidden_states_have_full_length(family: Family, plan: str) -> None:
    model, batch = family.model(), mixed(family)
    with torch.no_grad():
        untouched = model(**batch.inputs, output_hidden_states=True).hidden_states
        with mmfast.accelerate(model, plan):
            output = model(**batch.inputs, output_hidden_states=True)
    assert [states.shape for states in output.hidden_states] == [states.shape for states in untouched]
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    # Layers before the first drop have read the same tokens.
    same = 1 if plan == BEFORE else 3
    ids = batch.inputs["input_ids"][0]
    text = (ids >= TEXT.start) & (ids < TEXT.stop)
    for layer in range(same):
        assert (output.hidden_states[layer] - untouched[layer])[0, text].abs().max() < CLOSE
    assert (output.hidden_states[-1] - untouched[-1]).abs().max() > FAR


@every_family
def test_attention_weights_are_refused(family: Family) -> None:
    model, batch = family.model("eager"), two(family)
    with torch.no_grad():
        # The first call of this kind makes transformers put hooks on the vision tower.
        untouched = model(**batch.inputs, output_attentions=True)
    stock = census(model)
    with mmfast.accelerate(model, INSIDE):
        with pytest.raises(ValueError, match="output_attentions=True is not possible while tokens are dropped"):
            model(**batch.inputs, output_attentions=True)
        good = first_logits(model, batch.inputs)
    assert (good[0] - expected(batch, INSIDE).logits[0]).abs().max() < CLOSE
    assert census(model) == stock
    with torch.no_grad():
        again = model(**batch.inputs, output_attentions=True)
    assert torch.equal(again.attentions[0], untouched.attentions[0])


@every_family
@pytest.mark.parametrize("plan", [BEFORE, INSIDE])
def test_logits_to_keep(family: Family, plan: str) -> None:
    model, batch = family.model(), mixed(family)
    with mmfast.accelerate(model, plan), torch.no_grad():
        full = model(**batch.inputs).logits
        last = model(**batch.inputs, logits_to_keep=2).logits
    assert last.shape[1] == 2
    assert (last - full[:, -2:]).abs().max() < CLOSE
