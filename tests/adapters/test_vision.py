"""Signals of the vision encoder, against its own eager attention and patches followed one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.adapters.attention import _listeners
from mmfast.plan import Plan
from mmfast.token_pruning.base import VisionSignal
from support.cases import VIDEO_CASES, case_id, mixed, two
from support.checks import census, registries
from support.encoder import ATTENTION, blocks_of, encoder
from support.families import FAMILIES, Batch, Family
from support.probes import InnerProbe, Probe, Returned, probe, wanted

CLOSE = 2e-5
WITH_CLASS = {"llava", "vipllava", "llava_next", "llava_next_video", "video_llava", "internvl"}
PROJECTABLE = {
    ("llava", "image"),
    ("llava_next", "image"),
    ("llava_next_video", "image"),
    ("llava_next_video", "video"),
    ("llava_onevision", "image"),
    ("video_llava", "image"),
    ("video_llava", "video"),
    ("paligemma", "image"),
}


def only_video(family: Family) -> Batch:
    """One video and nothing else to encode."""
    return family.batch([3, family.video(1), 2])


def anyres(family: Family) -> Batch:
    """One image, which families that cut images into tiles do cut."""
    return family.batch([3, family.image(family.sizes - 1, 2), 4])


IMAGES = [(family, case) for family in FAMILIES.values() for case in (anyres, two)]
MEDIA = IMAGES + [(family, only_video) for family in FAMILIES.values() if family.has_video]
MIXED = [(family, mixed) for family in FAMILIES.values()] + VIDEO_CASES


def modality_of(case: Callable[[Family], Batch]) -> str:
    return "video" if case is only_video else "image"


def signals_of(*layers: Any) -> dict[str, VisionSignal]:
    """Every kind of signal, of some blocks, with every way to treat the heads."""
    found = {}
    for layer in layers:
        for kind in ATTENTION:
            for heads in ("mean", "sum", "join"):
                found[f"{kind} {layer} {heads}"] = VisionSignal(kind, layer, heads)
        for kind in ("keys", "queries"):
            for heads in ("mean", "join"):
                found[f"{kind} {layer} {heads}"] = VisionSignal(kind, layer, heads)
        found[f"patch_features {layer}"] = VisionSignal("patch_features", layer)
    return found


def feature_block(family: Family) -> int:
    """The block whose output the model reads, by the defaults of the families' configurations."""
    depth = len(blocks_of(family.model(), "image"))
    return depth - 2 if family.name in WITH_CLASS - {"internvl", "vipllava"} else depth - 1


# ------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(("family", "case"), MEDIA, ids=case_id)
def test_signals_are_those_of_the_encoder(family: Family, case: Callable[[Family], Batch]) -> None:
    batch, modality = case(family), modality_of(case)
    last = len(blocks_of(family.model(), modality)) - 1
    signals = signals_of("features", "last", 1)
    seen = probe(batch, wanted(**signals))
    reference = encoder(batch, modality)
    assert reference.cls == (family.name in WITH_CLASS)
    keeps = (family.name, modality) == ("video_llava", "video")
    for name, spec in signals.items():
        block = {"features": feature_block(family), "last": last, 1: 1}[spec.layer]
        expected = reference.expected(spec, block, keeps)
        found = torch.cat([tokens.signals[name] for tokens in seen])
        assert found.dtype == torch.float32
        assert found.ndim == (1 if spec.kind in ATTENTION else 2), name
        assert torch.allclose(found.reshape(expected.shape), expected, atol=CLOSE, rtol=1e-4), name
    for tokens in seen:
        newline = tokens.layout.is_newline
        assert all(not tokens.signals[name][newline].any() for name in signals)


@pytest.mark.parametrize(("family", "case"), [pair for pair in MEDIA if pair[0].name in WITH_CLASS], ids=case_id)
def test_features_of_the_class_token_come_tile_by_tile(family: Family, case: Callable[[Family], Batch]) -> None:
    batch, modality = case(family), modality_of(case)
    seen = probe(batch, wanted(cls_features=VisionSignal("cls_features", 1)))
    reference = encoder(batch, modality)
    starts = [sum(reference.tiles[:tile]) for tile in range(len(reference.tiles))]
    found = torch.cat([tokens.signals["cls_features"] for tokens in seen])
    assert torch.allclose(found, reference.states[1][starts], atol=CLOSE, rtol=1e-4)
    for tokens in seen:
        assert len(tokens.signals["cls_features"]) == len(tokens.layout.tiles())


@pytest.mark.parametrize(("family", "case"), MIXED, ids=case_id)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_batch_gives_what_its_rows_give(family: Family, case: Callable[[Family], Batch], attention: str) -> None:
    signals, model, batch = wanted(**signals_of("features")), family.model(attention), case(family)
    together = probe(batch, signals, model)
    alone = [tokens for row in range(len(batch)) for tokens in probe(batch.alone(row), signals, model)]
    assert len(together) == len(alone) > 1
    for first, second in zip(together, alone, strict=True):
        for name, _ in signals:
            assert torch.allclose(first.signals[name], second.signals[name], atol=CLOSE, rtol=1e-4), name


@pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
def test_no_image_leaks_into_another(family: Family) -> None:
    if family.name == "llava_onevision":
        # Images that share a prompt are not cut: two rows of one image each are.
        batches = [family.batch([2, family.image(0, 1)], [3, family.image(1, seed)]) for seed in (2, 3)]
    else:
        batches = [family.batch([2, family.image(0, 1), 2, family.image(family.sizes - 1, seed)]) for seed in (2, 3)]
    signals = wanted(**signals_of("last"))
    first, second = (probe(batch, signals) for batch in batches)
    for name, _ in signals:
        assert torch.equal(first[0].signals[name], second[0].signals[name])
        assert not torch.equal(first[-1].signals[name], second[-1].signals[name])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
def test_half_precision(family: Family) -> None:
    signals = signals_of(0)
    exact = probe(two(family), wanted(**signals))
    rounded = probe(two(family), wanted(**signals), family.model(dtype=torch.bfloat16))
    for first, second in zip(exact, rounded, strict=True):
        for name, spec in signals.items():
            value, reference = second.signals[name], first.signals[name]
            assert value.dtype == (torch.bfloat16 if spec.kind == "patch_features" else torch.float32)
            assert bool(value.isfinite().all())
            assert (value.float() - reference).abs().max() < 0.05 * reference.abs().max(), name


# ------------------------------------------------------------------------------ inside the LLM


@pytest.mark.parametrize(("family", "case"), MIXED, ids=case_id)
def test_methods_inside_the_llm_get_the_rows_of_what_is_left(family: Family, case: Callable[[Family], Batch]) -> None:
    batch, model = case(family), family.model()
    signals = wanted(attention=VisionSignal("received_attention"), keys=VisionSignal("keys", 0, "join"))
    before = [row for row in range(len(batch)) for _ in probe(batch.alone(row), signals)]
    whole = probe(batch, signals)
    InnerProbe.seen.clear()
    plan = Plan((mmfast.Plan.parse("uniform(keep=0.5)").methods[0], InnerProbe(layer=2, keep=0.5, signals=signals)))
    with mmfast.accelerate(model, plan) as fast, torch.no_grad():
        model(**batch.inputs)
        records = fast.report().media
    rows = sorted(set(before))
    assert len(InnerProbe.seen) == len(rows)
    for row, tokens in zip(rows, InnerProbe.seen, strict=True):
        own = [(record, item) for record, item, at in zip(records, whole, before, strict=True) if at == row]
        for name, _ in signals:
            expected = torch.cat([item.signals[name][index] for record, item in own for index in [_candidates(record)]])
            assert torch.equal(tokens.signals[name], expected)
            assert len(expected) == len(tokens.candidates) > 0


def _candidates(record: Any) -> Tensor:
    entered: Tensor = record.entered_indices
    return entered[~record.layout.is_newline[entered]]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
def test_generation_with_beams(family: Family) -> None:
    # With two images in one row transformers 5.17 hands the beams each other's images.
    model, batch = family.model(), family.batch([2, family.image(0, 1), 3], [4], [3, family.image(0, 2), 2])
    signals = wanted(attention=VisionSignal("received_attention"))
    with mmfast.accelerate(model, Plan((Probe(keep=0.5, signals=signals), InnerProbe(keep=0.5, signals=signals)))):
        Probe.seen.clear()
        model.generate(**batch.inputs, max_new_tokens=3, num_beams=2, do_sample=False)
    assert Probe.seen
    assert all(bool(tokens.signals["attention"].isfinite().all()) for tokens in Probe.seen)


# ---------------------------------------------------------------------------------- projecting


@pytest.mark.parametrize(("family", "case"), MEDIA, ids=case_id)
def test_features_of_the_encoder_are_projected(family: Family, case: Callable[[Family], Batch]) -> None:
    """Handing features back untouched, from before the projector, must change nothing."""
    batch, model = case(family), family.model()
    (tokens, *_) = probe(batch, wanted(patch_features=VisionSignal("patch_features")))
    assert tokens.projectable == ((family.name, modality_of(case)) in PROJECTABLE)
    if not tokens.projectable:
        with mmfast.accelerate(model, Plan((Returned(keep=3),))), pytest.raises(ValueError, match="token by token"):
            model(**batch.inputs)
        return
    logits = []
    for method in (Probe(keep=3), Returned(keep=3), Returned(keep=3, shift=1)):
        with mmfast.accelerate(model, Plan((method,))), torch.no_grad():
            logits.append(model(**batch.inputs).logits[:, -1])
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert (logits[0] - logits[2]).abs().max() > 0.1


def test_features_of_other_blocks_are_not_projected() -> None:
    batch = FAMILIES["llava"].batch([2, FAMILIES["llava"].image(), 3])
    for layer, projectable in (("features", True), (1, True), (0.34, True), ("last", False), (0, False)):
        (tokens,) = probe(batch, wanted(patch_features=VisionSignal("patch_features", layer)))
        assert tokens.projectable == projectable


def test_merged_features_hand_the_gradient_on() -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), family.batch([2, family.image(), 3])
    weight = blocks_of(model, "image")[0].self_attn.v_proj.weight
    with mmfast.accelerate(model, Plan((Returned(keep=3, shift=1),))):
        (found,) = torch.autograd.grad(model(**batch.inputs).logits[:, -1].sum(), weight)
    assert found.abs().max() > 1e-3


# --------------------------------------------------------------------------------------- traces


class Interrupted(Exception):
    """Raised in the middle of the encoder."""


@pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_nothing_is_left_behind(family: Family, fails: bool) -> None:
    model, batch = family.model(), two(family)
    blocks = blocks_of(model, "image")
    signals = wanted(**signals_of("features", 0))

    def tower() -> Any:
        watched = [module for block in blocks for module in block.modules() if module in _listeners]
        return [census(block) for block in blocks], watched, registries()

    def interrupt(module: nn.Module, args: Any, output: Any) -> None:
        assert tower() != untouched
        raise Interrupted

    pristine = census(model), registries()
    untouched = tower()
    assert untouched[1] == []
    with torch.no_grad():
        before = model(**batch.inputs).logits
        with mmfast.accelerate(model, Plan((Probe(keep=0.5, signals=signals),))):
            assert tower() == untouched
            if fails:
                handle = blocks[0].mlp.register_forward_hook(interrupt) if hasattr(blocks[0], "mlp") else None
                handle = handle or blocks[0].feed_forward.register_forward_hook(interrupt)
                with pytest.raises(Interrupted):
                    model(**batch.inputs)
                handle.remove()
            else:
                model(**batch.inputs)
            assert tower() == untouched
        assert (census(model), registries()) == pristine
        assert torch.equal(model(**batch.inputs).logits, before)
