"""The contract: what holds for every registered method on every family."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

import mmfast
from mmfast.adapters import families, for_model
from support.cases import CASES, case_id, mixed, one, text_only, two
from support.checks import CLOSE, FAR, census, check_against_reference, first_logits, generate, registries
from support.families import FAMILIES, Batch, Family, cast
from support.reference import decoder_inputs, items_of

METHODS = [info for info in mmfast.methods() if info.stage in ("before_llm", "in_llm")]
PAIRS = list(product(FAMILIES.values(), METHODS))
BOTH_STAGES = ["uniform(keep=0.4)", "fastv(keep=0.4)"]


def readable(value: object) -> str | None:
    return value.name if isinstance(value, mmfast.MethodInfo) else case_id(value)


every = pytest.mark.parametrize(("family", "info"), PAIRS, ids=readable)
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=readable)


def lacks_grid(info: mmfast.MethodInfo, batch: Batch) -> bool:
    """Say whether a method needs grids and some image or video of the batch has none."""
    layouts = [layout for row in batch.media for media in row for layout in media.layouts]
    return info.name == "pool2d" and not all(layout.grid_known for layout in layouts)


def test_every_supported_model_type_is_tested() -> None:
    # The mixture-of-experts twin shares the adapter, the vision side and the attention of its family.
    assert set(families()) - {"qwen3_vl_moe"} == set(FAMILIES)


def test_methods_of_other_stages_have_a_battery_of_their_own() -> None:
    assert {info.stage for info in mmfast.methods()} == {"before_llm", "in_llm"}


# ------------------------------------------------------------------------------ off means off


@every
def test_keep_all_is_identity(family: Family, info: mmfast.MethodInfo) -> None:
    model, batch = family.model(), mixed(family)
    before = generate(model, batch.inputs)
    with mmfast.accelerate(model, f"{info.name}(keep=1.0)"):
        during = generate(model, batch.inputs)
        forward = first_logits(model, batch.inputs)
    assert torch.equal(during.tokens, before.tokens)
    assert torch.equal(during.logits, before.logits)
    assert torch.equal(forward, first_logits(model, batch.inputs))


@every
def test_text_only_prompts_are_untouched(family: Family, info: mmfast.MethodInfo) -> None:
    model, batch = family.model(), text_only(family)
    before = generate(model, batch.inputs)
    with mmfast.accelerate(model, f"{info.name}(keep=2)") as fast:
        during = generate(model, batch.inputs)
        assert "no prompt with images" in fast.report().note
    assert torch.equal(during.logits, before.logits)


# --------------------------------------------------------------------- the right thing is computed


@pytest.mark.parametrize(
    ("family", "case", "info"),
    [(family, case, info) for family, case in CASES for info in METHODS],
    ids=readable,
)
@pytest.mark.parametrize("keep", ["0.4", "5"])
def test_prefill_and_decode_equal_the_reference(
    family: Family, case: Callable[[Family], Batch], info: mmfast.MethodInfo, keep: str
) -> None:
    """Also the exact tokens that survive, per image and per layer, and that this makes a difference."""
    batch, plan = case(family), f"{info.name}(keep={keep})"
    if lacks_grid(info, batch):
        model = family.model()
        with mmfast.accelerate(model, plan), pytest.raises(ValueError, match="needs to know the grid"):
            generate(model, batch.inputs)
        return
    check_against_reference(batch, plan)


@every
@pytest.mark.parametrize("keep", [0.4, 0.07, 3])
def test_count_is_the_promised_one(family: Family, info: mmfast.MethodInfo, keep: float) -> None:
    model, batch = family.model(), one(family)
    method = info.method(keep=keep)
    with mmfast.accelerate(model, [method]) as fast:
        first_logits(model, batch.inputs)
        report = fast.report()
    (item,) = items_of(batch)
    (record,) = report.media
    candidates = int((~item.layout.is_newline).sum())
    newlines = len(item.slots) - candidates
    assert record.tokens == len(item.slots)
    assert report.text_tokens == [len(batch.ids[0]) - len(item.slots)]
    for kept in (record.entered_indices, record.left_indices):
        assert kept.unique().tolist() == kept.tolist()
        assert 0 <= int(kept.min()) <= int(kept.max()) < len(item.slots)
    entered = record.entered_indices[~item.layout.is_newline[record.entered_indices]]
    text = report.text_tokens[0]
    if info.stage == "in_llm":
        assert len(entered) == candidates
        predicted = method.tokens_per_layer(candidates, text + newlines, len(model.get_decoder().layers))
        assert report.tokens_per_layer == [predicted]
        return
    promised = method.keep_count(candidates)
    # Cells of a pooled grid cannot make up every number; no other kind may keep fewer than it was told.
    assert len(entered) == promised or (info.kind == "Merger" and 1 <= len(entered) < promised)
    assert report.tokens_per_layer == [[text + record.entered] * len(model.get_decoder().layers)]


@every
def test_text_tokens_enter_untouched(family: Family, info: mmfast.MethodInfo) -> None:
    model, batch = family.model(), two(family)
    with torch.no_grad():
        untouched = decoder_inputs(model, batch.inputs)["inputs_embeds"][0]
        with mmfast.accelerate(model, f"{info.name}(keep=0.4)") as fast:
            seen = decoder_inputs(model, batch.inputs)["inputs_embeds"][0]
            first_logits(model, batch.inputs)
            records = fast.report().media
    items = items_of(batch)
    text = torch.ones(len(untouched), dtype=torch.bool)
    entered = text.clone()
    for item, record in zip(items, records, strict=True):
        text[item.slots] = False
        entered[item.slots] = False
        entered[item.slots[record.entered_indices]] = True
    assert len(seen) == int(entered.sum())
    assert torch.equal(seen[text[entered]], untouched[text])


@every
def test_batch_of_mixed_sizes_equals_one_by_one(family: Family, info: mmfast.MethodInfo) -> None:
    model, batch = family.model(), mixed(family)
    with mmfast.accelerate(model, f"{info.name}(keep=0.4)"):
        together = generate(model, batch.inputs)
        for row in range(len(batch)):
            alone = generate(model, batch.alone(row).inputs)
            assert torch.equal(alone.tokens[0], together.tokens[row])
            assert (alone.logits[0] - together.logits[row]).abs().max() < CLOSE


@every
def test_two_runs_are_equal(family: Family, info: mmfast.MethodInfo) -> None:
    model, batch, plan = family.model(), mixed(family), f"{info.name}(keep=0.4)"
    with mmfast.accelerate(model, plan):
        first, second = generate(model, batch.inputs, 3), generate(model, batch.inputs, 3)
    with mmfast.accelerate(model, plan):
        third = generate(model, batch.inputs, 3)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.logits, third.logits)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_finite(family: Family, info: mmfast.MethodInfo, dtype: torch.dtype) -> None:
    model = family.model(dtype=dtype)
    inputs = cast(mixed(family).inputs, dtype)
    with mmfast.accelerate(model, f"{info.name}(keep=0.4)") as fast:
        done = generate(model, inputs, 3)
        assert all(record.entered > 0 for record in fast.report().media)
    assert bool(done.logits.isfinite().all())


# ------------------------------------------------------------------------ and nothing is left behind


@every
def test_remove_restores_the_model(family: Family, info: mmfast.MethodInfo) -> None:
    model, batch = family.model(), mixed(family)
    logits, stock, tables = first_logits(model, batch.inputs), census(model), registries()
    fast = mmfast.accelerate(model, f"{info.name}(keep=0.4)")
    assert census(model) != stock
    generate(model, batch.inputs, 2)
    fast.remove()
    assert census(model) == stock
    assert registries() == tables
    assert torch.equal(first_logits(model, batch.inputs), logits)
    fast.remove()
    assert census(model) == stock


@every
def test_an_exception_inside_a_method_leaves_nothing(
    family: Family, info: mmfast.MethodInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = family.model(), two(family)
    logits, stock, tables = first_logits(model, batch.inputs), census(model), registries()

    def fail(*_: object) -> None:
        raise RuntimeError("the method gave up")

    with mmfast.accelerate(model, f"{info.name}(keep=0.4)"):
        good = generate(model, batch.inputs, 2)
        during = census(model)
        with monkeypatch.context() as patch:
            patch.setattr(info.method, "__call__", fail)
            with pytest.raises(RuntimeError, match="the method gave up"):
                generate(model, batch.inputs, 2)
        # Between calls nothing of the broken one may be left either.
        assert census(model) == during
        assert torch.equal(generate(model, batch.inputs, 2).logits, good.logits)
        with monkeypatch.context() as patch:
            patch.setattr(info.method, "__call__", fail)
            with pytest.raises(RuntimeError, match="the method gave up"):
                first_logits(model, batch.inputs)
    assert census(model) == stock
    assert registries() == tables
    assert torch.equal(first_logits(model, batch.inputs), logits)


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
def test_a_refused_method_leaves_nothing(family: Family) -> None:
    model, stock = family.model(), census(family.model())
    with pytest.raises(ValueError, match=r"layer=5 means layer 5, which must lie in 1\.\.4"):
        mmfast.accelerate(model, "fastv(layer=5)")
    if not for_model(model).can_compact:
        for method in ("uniform", "fastv"):
            with pytest.raises(ValueError, match="positions='compact' is not possible for model type"):
                mmfast.accelerate(model, f"{method}(positions='compact')")
    assert census(model) == stock


@every
def test_a_registered_method_is_documented(family: Family, info: mmfast.MethodInfo) -> None:
    assert info.summary.endswith(".")
