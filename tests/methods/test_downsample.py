"""Downsampling: the encoder is shown a smaller picture, and each of its tokens gets one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate

import mmfast
from mmfast.plan import Plan
from mmfast.registry import get
from mmfast.token_pruning.base import VisionSignal
from mmfast.token_pruning.encoder_base import GROUPS
from mmfast.tokens import Layout, VisualTokens
from support.cases import REFUSALS, case_id, mixed, one, two, video
from support.checks import census, check_against_reference, first_logits, generate
from support.families import FAMILIES, Batch, Family
from support.probes import InnerProbe, wanted
from support.reference import decoder_inputs

RESIZED = [family for name, family in FAMILIES.items() if name not in REFUSALS["downsample"][0]]
CASES = [(family, case) for family in RESIZED for case in (one, two, mixed, *([video] if family.has_video else []))]


def tokens_of(groups: list[int], layout: Layout) -> VisualTokens:
    features = torch.arange(1.0, len(layout) + 1)[:, None]
    return VisualTokens(features, layout, signals={GROUPS: torch.tensor(groups)})


def test_each_token_takes_the_place_in_the_middle_of_what_it_shows() -> None:
    # A 3 x 4 grid resized to 1 x 2: each token shows 3 x 2 places.
    decision = get("downsample").method(keep=3)(tokens_of([0, 0, 1, 1] * 3, Layout.grid(3, 4)))
    assert decision.indices.tolist() == [4, 6]
    assert decision.features.flatten().tolist() == [5.0, 7.0]
    assert decision.sizes.tolist() == [6.0, 6.0]
    assert decision.source.tolist() == [0, 0, 1, 1] * 3


def test_evenly_spread_frames_survive_where_there_are_too_many() -> None:
    # Five frames of 2 x 2, each resized to one token; two may be kept.
    groups = [frame for frame in range(5) for _ in range(4)]
    decision = get("downsample").method(keep=2)(tokens_of(groups, Layout.grid(2, 2, frames=5)))
    assert decision.indices.tolist() == [4, 12]
    assert decision.source.tolist() == [-1] * 4 + [0] * 4 + [-1] * 4 + [1] * 4 + [-1] * 4


# --------------------------------------------------------------------------------------- on models


@pytest.mark.parametrize(("family", "case"), CASES, ids=case_id)
@pytest.mark.parametrize("keep", ["4", "0.6", "1"])
def test_it_computes_what_the_reference_does(family: Family, case: Callable[[Family], Batch], keep: str) -> None:
    check_against_reference(case(family), f"downsample(keep={keep})", steps=2)


@pytest.mark.parametrize("name", ["llava", "paligemma", "video_llava"])
def test_features_are_those_of_the_resized_picture(name: str) -> None:
    """The model's own call on the smaller picture gives them, without any code of the library."""
    family = FAMILIES[name]
    model, batch = family.model(), one(family)
    (full,) = (value for key, value in batch.inputs.items() if key.startswith("pixel"))
    small = interpolate(full, (8, 8), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = model.base_model.get_image_features(small, interpolate_pos_encoding=True).pooler_output
    with mmfast.accelerate(model, "downsample(keep=4)") as fast:
        seen = decoder_inputs(model, batch.inputs)["inputs_embeds"][0]
        first_logits(model, batch.inputs)
        (record,) = fast.report().media
    assert record.entered == 4
    start = batch.ids[0].index(batch.media[0][0].ids[0])
    assert torch.allclose(seen[start : start + 4], expected[0], atol=1e-4)


@pytest.mark.parametrize("family", RESIZED, ids=case_id)
def test_the_encoder_runs_on_fewer_patches(family: Family) -> None:
    model, batch = family.model(), one(family)
    tower = model.get_encoder(modality="image") if family.name != "video_llava" else model.model.image_tower
    blocks = max((part for part in tower.modules() if isinstance(part, torch.nn.ModuleList)), key=len)
    seen: list[int] = []
    handle = blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2]))
    try:
        first_logits(model, batch.inputs)
        with mmfast.accelerate(model, "downsample(keep=1)"):
            first_logits(model, batch.inputs)
    finally:
        handle.remove()
    full, small = seen
    tokens = len(batch.media[0][0].layouts[0])
    first = int(full % tokens != 0)
    assert small - first == (full - first) // tokens


def test_the_embedded_model() -> None:
    model, processor = mmfast.load_default()
    inputs = processor(text="<image> what color is the ring?", images=mmfast_picture(), return_tensors="pt")
    with mmfast.accelerate(model, "downsample(keep=64)") as fast, torch.no_grad():
        logits = model(**inputs).logits
        (record,) = fast.report().media
    assert (record.tokens, record.entered) == (256, 64)
    assert bool(logits.isfinite().all())
    assert record.layout.row[record.entered_indices].unique().tolist() == list(range(0, 16, 2))


def mmfast_picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (224, 224), (200, 30, 30))


def test_as_many_as_there_are_is_the_full_picture() -> None:
    for name in ("llava", "qwen2_vl"):
        family = FAMILIES[name]
        batch = mixed(family)
        plain = generate(family.model(), batch.inputs, 3)
        with mmfast.accelerate(family.model(), "downsample(keep=25)"):
            assert torch.equal(generate(family.model(), batch.inputs, 3).logits, plain.logits)


def test_grids_worked_out_before_do_not_stay() -> None:
    """Callers may hand the encoder what they worked out for the full grids."""
    family = FAMILIES["qwen2_vl"]
    model, batch = family.model(), one(family)
    grid = batch.inputs["image_grid_thw"]
    seqlens = torch.tensor([0, int(grid.prod())], dtype=torch.int32)
    with mmfast.accelerate(model, "downsample(keep=4)"), torch.no_grad():
        plain = model.model.get_image_features(batch.inputs["pixel_values"], grid)
        handed = model.model.get_image_features(batch.inputs["pixel_values"], grid, cu_seqlens=seqlens)
    assert torch.equal(plain.pooler_output[0], handed.pooler_output[0])


# ------------------------------------------------------------------------------ undone, or refused


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "idefics3"])
def test_nothing_is_left_behind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    model, batch = family.model(), two(family)
    logits, stock = first_logits(model, batch.inputs), census(model)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no room for a picture")

    with mmfast.accelerate(model, "downsample(keep=4)"):
        during = census(model)
        with monkeypatch.context() as patch:
            patch.setattr("mmfast.adapters.resizing.resized_to", fail)
            with pytest.raises(RuntimeError, match="no room for a picture"):
                first_logits(model, batch.inputs)
        assert census(model) == during
    assert census(model) == stock
    assert torch.equal(first_logits(model, batch.inputs), logits)


@pytest.mark.parametrize("name", REFUSALS["downsample"][0])
def test_models_that_pack_pictures_are_refused(name: str) -> None:
    model = FAMILIES[name].model()
    stock = census(model)
    with pytest.raises(ValueError, match=f"cannot resize pictures for models of type '{name}': .*'pool2d'"):
        mmfast.accelerate(model, "downsample()")
    assert census(model) == stock


def test_padded_pictures_are_refused() -> None:
    family = FAMILIES["idefics3"]
    model, batch = family.model(), one(family)
    pixels = batch.inputs["pixel_values"]
    mask = torch.ones(*pixels.shape[:2], *pixels.shape[3:])
    mask[..., -2:] = 0
    with mmfast.accelerate(model, "downsample(keep=4)"), pytest.raises(ValueError, match="pictures with padding"):
        model(**batch.inputs, pixel_attention_mask=mask)


def test_reading_a_packed_encoder_beside_it_is_refused() -> None:
    reading = InnerProbe(layer=1, keep=2, signals=wanted(keys=VisionSignal("keys")))
    plan = Plan((get("downsample").method(keep=4), reading))
    with pytest.raises(ValueError, match="cannot run beside a method that reads the vision encoder"):
        mmfast.accelerate(FAMILIES["qwen2_vl"].model(), plan)
    InnerProbe.seen.clear()
    family = FAMILIES["llava"]
    with mmfast.accelerate(family.model(), plan):
        first_logits(family.model(), one(family).inputs)
    (seen,) = InnerProbe.seen
    assert seen.signals["keys"].shape[0] == 4
