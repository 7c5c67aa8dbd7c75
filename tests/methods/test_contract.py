"""The contract: what holds for every registered method on every family.

The promises that a family could break are tested for every pair, the others for families that differ
(``--slow``: for every pair). What a pruned model must compute is compared with an independent reference for
every pair on one batch, and on all prompts for the pairs named in THOROUGH.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast.adapters import families, for_model
from support.cases import (
    CASES,
    UNKNOWN_GRIDS,
    case_id,
    lacks_grid,
    mixed,
    one,
    refusal,
    text_only,
    two,
)
from support.checks import (
    CLOSE,
    FAR,
    Generated,
    census,
    check_against_reference,
    check_row,
    first_logits,
    generate,
    registries,
)
from support.families import FAMILIES, Batch, Family, cast
from support.reference import decoder_inputs, items_of

# Methods with compression tokens need prompts that hold them: tests/models/test_voco.py is their battery.
METHODS = [info for info in mmfast.methods() if info.stage in ("before_llm", "in_llm") and info.kind != "Compressor"]
PAIRS = [(family, info) for family, info in product(FAMILIES.values(), METHODS) if not refusal(family, info.name)]
BOTH_STAGES = ["uniform(keep=0.4)", "fastv(keep=0.4)"]
STEPS = 3

SIMPLE = {"divprune", "fastv", "pool2d", "pyramiddrop", "random", "random_in_llm", "uniform", "uniform_in_llm"}
"""Methods that between them use every seam; compared with the reference on every prompt of every family."""
DISTINCT = {"llava", "llava_next", "qwen2_5_vl", "internvl"}
"""Families that differ in everything a method can notice; every method is compared on all their prompts."""
THOROUGH = [
    (family, case, info)
    for (family, case), info in product(CASES, METHODS)
    if (family.name in DISTINCT or info.name in SIMPLE) and case is not mixed and not refusal(family, info.name)
]

every = pytest.mark.parametrize(("family", "info"), PAIRS, ids=case_id)
# What no family can change much is tested for all pairs only with --slow.
every_distinct = pytest.mark.parametrize(
    ("family", "info"),
    [pytest.param(family, info, marks=[] if family.name in DISTINCT else pytest.mark.slow) for family, info in PAIRS],
    ids=case_id,
)
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
with_keep = pytest.mark.parametrize(
    ("family", "info"), [(family, info) for family, info in PAIRS if "keep" in info.options], ids=case_id
)

POOLS_MAPS = {
    *("pool2d", "downsample", "dpn"),
    *("llava_mini_resampler", "m3_pool", "oryx_compressor", "pool_adapter", "tokenpacker", "uhd_resampler"),
}
"""Methods that leave whole maps of tokens, whose sizes cannot make up every number."""
NO_EFFECT = {("aki_mma", "paligemma")}
"""PaliGemma reads prompts in both directions as it is."""


def plan_of(info: mmfast.MethodInfo, keep: float | None = 0.4) -> str:
    """Write a plan with one method; some have nothing to keep."""
    return f"{info.name}(keep={keep})" if "keep" in info.options else f"{info.name}()"


@cache
def untouched(family: Family, case: Callable[[Family], Batch]) -> Generated:
    """Generate without a plan."""
    return generate(family.model(), case(family).inputs, STEPS)


@cache
def pruned(family: Family, plan: str) -> tuple[Generated, mmfast.Report]:
    """Generate for the mixed batch under a plan, once for all tests."""
    with mmfast.accelerate(family.model(), plan) as fast:
        return generate(family.model(), mixed(family).inputs, STEPS), fast.report()


def test_every_supported_model_type_is_tested() -> None:
    # The mixture-of-experts twin shares the adapter, the vision side and the attention of its family.
    assert set(families()) - {"qwen3_vl_moe"} == set(FAMILIES)


def test_methods_of_other_stages_have_a_battery_of_their_own() -> None:
    assert {info.stage for info in mmfast.methods()} == {"frames", "before_llm", "in_llm", "cache", "decode"}


# ------------------------------------------------------------------------------ off means off


@with_keep
def test_keep_all_is_identity(family: Family, info: mmfast.MethodInfo) -> None:
    batch, before = mixed(family), untouched(family, mixed)
    with mmfast.accelerate(family.model(), plan_of(info, 1.0)):
        during = generate(family.model(), batch.inputs, STEPS)
    assert torch.equal(during.tokens, before.tokens)
    assert torch.equal(during.logits, before.logits)


@every_distinct
def test_text_only_prompts_are_untouched(family: Family, info: mmfast.MethodInfo) -> None:
    with mmfast.accelerate(family.model(), plan_of(info, 2)) as fast:
        during = generate(family.model(), text_only(family).inputs, 2)
        assert "no prompt with images" in fast.report().note
    assert torch.equal(during.logits, untouched(family, text_only).logits[:, :2])


# --------------------------------------------------------------------- the right thing is computed


@every
def test_prefill_and_decode_equal_the_reference(family: Family, info: mmfast.MethodInfo) -> None:
    """Also the exact tokens that survive, per image and per layer, and that this makes a difference."""
    done, report = pruned(family, plan_of(info))
    batch, before = mixed(family), untouched(family, mixed)
    for row in range(len(batch)):
        check_row(batch.alone(row), plan_of(info), row, done, report)
        if batch.media[row] and (info.name, family.name) not in NO_EFFECT:
            assert (done.logits[row, 0] - before.logits[row, 0]).abs().max() > FAR


@pytest.mark.parametrize(("family", "case", "info"), THOROUGH, ids=case_id)
def test_every_prompt_equals_the_reference(
    family: Family, case: Callable[[Family], Batch], info: mmfast.MethodInfo
) -> None:
    """With a count instead of a fraction, and eight steps."""
    batch, plan = case(family), plan_of(info, 5)
    if info.name in UNKNOWN_GRIDS and lacks_grid(batch):
        with (
            mmfast.accelerate(family.model(), plan),
            pytest.raises(ValueError, match=UNKNOWN_GRIDS[info.name]),
        ):
            generate(family.model(), batch.inputs)
        return
    far = -1.0 if (info.name, family.name) in NO_EFFECT else FAR
    check_against_reference(batch, plan, far=far)


@pytest.mark.parametrize(
    ("family", "info"),
    [(family, info) for family, info in PAIRS if family.name in DISTINCT and getattr(info.method, "adaptive", False)],
    ids=case_id,
)
def test_where_the_data_decide(family: Family, info: mmfast.MethodInfo) -> None:
    """The method's own count is whatever it is, and may be everything."""
    check_against_reference(mixed(family), plan_of(info, None), far=-1.0)


@with_keep
@pytest.mark.filterwarnings("ignore:.*cannot be reached:UserWarning")
def test_count_is_the_promised_one(family: Family, info: mmfast.MethodInfo) -> None:
    model, batch = family.model(), one(family)
    (item,) = items_of(batch)
    candidates = int((~item.layout.is_newline).sum())
    text = len(batch.ids[0]) - len(item.slots)
    for keep in (0.4, 0.07, 3):
        method = info.method(keep=keep)
        with mmfast.accelerate(model, [method]) as fast:
            first_logits(model, batch.inputs)
            report = fast.report()
        check_count(info, method, report, item.layout.is_newline, candidates, text)


def check_count(
    info: mmfast.MethodInfo, method: Any, report: mmfast.Report, is_newline: Tensor, candidates: int, text: int
) -> None:
    (record,) = report.media
    assert record.tokens == len(is_newline)
    assert report.text_tokens == [text]
    for kept in (record.entered_indices, record.left_indices):
        assert kept.unique().tolist() == kept.tolist()
        assert not len(kept) or 0 <= int(kept[0]) <= int(kept[-1]) < len(is_newline)
    entered = record.entered_indices[~is_newline[record.entered_indices]]
    depth = len(report.tokens_per_layer[0])
    if info.stage == "in_llm":
        assert len(entered) == candidates
        newlines = len(is_newline) - candidates
        promised, (layers,) = method.keep_counts(candidates, text + newlines, depth), report.tokens_per_layer
        # Only where whole maps are pooled can the count not be told; it falls all the same.
        assert layers == promised or (promised is None and info.name in POOLS_MAPS and layers == sorted(layers)[::-1])
        return
    wanted = method.keep_count(candidates)
    # Cells of a pooled grid cannot make up every number; nothing else may keep fewer than it was told.
    assert len(entered) == wanted or (info.name in POOLS_MAPS and 1 <= len(entered) < wanted)
    assert report.tokens_per_layer == [[text + record.entered] * depth]


@pytest.mark.parametrize(
    ("family", "info"), [(family, info) for family, info in PAIRS if info.stage == "before_llm"], ids=case_id
)
def test_text_tokens_enter_untouched(family: Family, info: mmfast.MethodInfo) -> None:
    model, batch = family.model(), two(family)
    with torch.no_grad():
        before = decoder_inputs(model, batch.inputs)["inputs_embeds"][0]
        with mmfast.accelerate(model, plan_of(info)) as fast:
            seen = decoder_inputs(model, batch.inputs)["inputs_embeds"][0]
            first_logits(model, batch.inputs)
            records = fast.report().media
    items = items_of(batch)
    text = torch.ones(len(before), dtype=torch.bool)
    entered = text.clone()
    for item, record in zip(items, records, strict=True):
        text[item.slots] = False
        entered[item.slots] = False
        entered[item.slots[record.entered_indices]] = True
    assert len(seen) == int(entered.sum())
    assert torch.equal(seen[text[entered]], before[text])


# That rows of a batch do not disturb each other is tested for every pair above, against the reference of each row.
@every_distinct
def test_batch_of_mixed_sizes_equals_one_by_one(family: Family, info: mmfast.MethodInfo) -> None:
    batch, (together, _) = mixed(family), pruned(family, plan_of(info))
    with mmfast.accelerate(family.model(), plan_of(info)):
        for row in range(len(batch)):
            alone = generate(family.model(), batch.alone(row).inputs, STEPS)
            assert torch.equal(alone.tokens[0], together.tokens[row])
            assert (alone.logits[0] - together.logits[row]).abs().max() < CLOSE


@every_distinct
def test_two_runs_are_equal(family: Family, info: mmfast.MethodInfo) -> None:
    model, inputs, (first, _) = family.model(), mixed(family).inputs, pruned(family, plan_of(info))
    with mmfast.accelerate(model, plan_of(info)):
        second, third = generate(model, inputs, STEPS), generate(model, inputs, 1)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.logits[:, :1], third.logits)


@every_distinct
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_finite(family: Family, info: mmfast.MethodInfo, dtype: torch.dtype) -> None:
    model = family.model(dtype=dtype)
    inputs = cast(mixed(family).inputs, dtype)
    with mmfast.accelerate(model, plan_of(info)) as fast:
        done = generate(model, inputs, 2)
        assert all(record.entered > 0 for record in fast.report().media)
    assert bool(done.logits.isfinite().all())


# ------------------------------------------------------------------------ and nothing is left behind


@every
def test_remove_restores_the_model(family: Family, info: mmfast.MethodInfo) -> None:
    model, batch = family.model(), mixed(family)
    stock, tables = census(model), registries()
    fast = mmfast.accelerate(model, plan_of(info))
    assert census(model) != stock
    generate(model, batch.inputs, 2)
    fast.remove()
    assert census(model) == stock
    assert registries() == tables
    assert torch.equal(generate(model, batch.inputs, 1).logits, untouched(family, mixed).logits[:, :1])
    fast.remove()
    assert census(model) == stock


ENTRIES = {"LayerBypass": "route", "LayerMask": "visible"}
"""Kind of method -> what the adapters call; the others are called themselves."""


@every_distinct
def test_an_exception_inside_a_method_leaves_nothing(
    family: Family, info: mmfast.MethodInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = family.model(), mixed(family)
    stock, tables = census(model), registries()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the method gave up")

    with mmfast.accelerate(model, plan_of(info)):
        during = census(model)
        with monkeypatch.context() as patch:
            patch.setattr(info.method, ENTRIES.get(info.kind, "__call__"), fail)
            with pytest.raises(RuntimeError, match="the method gave up"):
                generate(model, batch.inputs, 2)
            with pytest.raises(RuntimeError, match="the method gave up"):
                first_logits(model, batch.inputs)
        # Between calls nothing of the broken ones may be left either.
        assert census(model) == during
        assert torch.equal(generate(model, batch.inputs, 2).logits, pruned(family, plan_of(info))[0].logits[:, :2])
    assert census(model) == stock
    assert registries() == tables


@every_family
@pytest.mark.parametrize("plan", BOTH_STAGES)
def test_a_half_failed_apply_leaves_nothing(family: Family, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = family.model(), one(family)
    logits, stock, tables = first_logits(model, batch.inputs), census(model), registries()
    calls, last = 0, 0

    def failing(original: Any) -> Any:
        def register(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                raise MemoryError("no room for another hook")
            return original(*args, **kwargs)

        return register

    for name in ("register_forward_pre_hook", "register_forward_hook"):
        monkeypatch.setattr(torch.nn.Module, name, failing(getattr(torch.nn.Module, name)))
    mmfast.accelerate(model, plan).remove()
    total, calls = calls, 0
    assert total >= 4
    for last in range(1, total + 1):  # noqa: B007 - read by the wrapper above
        calls = 0
        with pytest.raises(MemoryError):
            mmfast.accelerate(model, plan)
        assert census(model) == stock
        assert registries() == tables
    last = 0
    assert torch.equal(first_logits(model, batch.inputs), logits)
    with mmfast.accelerate(model, plan):
        assert (first_logits(model, batch.inputs) - logits).abs().max() > FAR


@every_family
@pytest.mark.parametrize("info", METHODS, ids=case_id)
def test_refusals_are_those_that_are_listed(family: Family, info: mmfast.MethodInfo) -> None:
    """A method that cannot work on a family says so at once, before anything is changed."""
    model, reason = family.model(), refusal(family, info.name)
    stock, tables = census(model), registries()
    for plan in (plan_of(info), f"{info.name}()"):
        if reason is None:
            mmfast.accelerate(model, plan).remove()
        else:
            with pytest.raises(ValueError, match=reason):
                mmfast.accelerate(model, plan)
        assert census(model) == stock
        assert registries() == tables


@every_family
def test_a_refused_option_leaves_nothing(family: Family) -> None:
    model, stock = family.model(), census(family.model())
    with pytest.raises(ValueError, match=r"layer=5 means layer 5, which must lie in 1\.\.4"):
        mmfast.accelerate(model, "fastv(layer=5)")
    if not for_model(model).can_compact:
        for method in ("uniform", "fastv"):
            with pytest.raises(ValueError, match="positions='compact' is not possible for model type"):
                mmfast.accelerate(model, f"{method}(positions='compact')")
    assert census(model) == stock
