"""Signals of the vision encoder at the edges: memory, masks, packing, windows, shrinking, refusals."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mmfast
from mmfast.adapters import for_model, vision_attention
from mmfast.adapters.media import Described, Segment
from mmfast.adapters.vision import VisionReader, block_of
from mmfast.adapters.vision_attention import VisionAttention
from mmfast.plan import Plan
from mmfast.token_pruning.base import VisionSignal
from mmfast.tokens import Layout
from support.cases import case_id, two
from support.encoder import Encoder, encoder, encoding_arguments, features, marks, recorded, unmixed
from support.families import FAMILIES, Batch, Family
from support.families.anyres import PATCH, LlavaOnevision
from support.families.base import pixels, placeholders, text_config, vision_config
from support.families.gemma import PaliGemma
from support.families.qwen import Qwen25VL
from support.families.tiles import PIXELS, SIDE
from support.probes import InnerProbe, Probe, Returned, probe, wanted
from support.prompts import IMAGE, Media, noise

RECEIVED = VisionSignal("received_attention", 0)

# ------------------------------------------------------------------------------------- numerics


def dense(attended: VisionAttention) -> Tensor:
    """All weights ``[B, H, N, N]``."""
    groups = attended.query.shape[1] // attended.key.shape[1]
    logits = attended.query @ attended.key.repeat_interleave(groups, 1).mT * attended.query.shape[-1] ** -0.5
    mask = attended.mask
    if mask is not None:
        mask = mask[:, None, None].bool() if mask.ndim == 2 else mask
        logits = logits.masked_fill(~mask, -1e30) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1)


def masks(kind: str, batch: int, count: int) -> Tensor | None:
    """Masks as attention functions get them: the last two tokens of the second row are padding."""
    real = torch.ones(batch, count, dtype=torch.bool)
    real[1, -2:] = False
    if kind == "flash":
        return real.long()
    if kind == "sdpa":
        return real[:, None, None].expand(-1, 1, count, -1)
    if kind == "eager":
        return torch.zeros(batch, 1, count, count).masked_fill(~real[:, None, None], torch.finfo(torch.float32).min)
    return None


@pytest.mark.parametrize("kind", ["none", "flash", "sdpa", "eager"])
@pytest.mark.parametrize("block", [1, 40, 2**22])
def test_received_attention_is_that_of_the_whole_matrix(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_attention, "_BLOCK", block)
    batch, heads, count = 2, 4, 7
    attended = VisionAttention(
        noise(batch, heads, count, 3, seed=1), noise(batch, 2, count, 3, seed=2), masks(kind, batch, count)
    )
    weights = dense(attended)
    real = torch.ones(batch, count) if kind == "none" else masks("flash", batch, count).float()
    expected = torch.einsum("bhqk,bq->bk", weights, real) / real.sum(1, keepdim=True)
    assert torch.allclose(attended.received(average=False), expected * real, atol=1e-5)
    assert torch.allclose(attended.received(average=True), expected * real / heads, atol=1e-5)
    assert torch.allclose(attended.first_row(softmax=True), weights[:, :, 0], atol=1e-5)


class Largest(TorchDispatchMode):
    """Remember the size of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return made


class Large(PaliGemma):
    """Images of 4096 patches, which are 4096 tokens."""

    def config(self) -> Any:
        config = super().config()
        config.vision_config.image_size = 256
        config.vision_config.num_hidden_layers = 1
        return config

    def first_prompt(self) -> Batch:
        return self.batch([3])


def test_memory_stays_bounded() -> None:
    """4096 patches and 2 heads have 33 million weights; no more than an eighth of them is ever there."""
    model = Large().model()
    reader = VisionReader(for_model(model), "image", [Probe(signals=wanted(received=RECEIVED))])
    arguments = {"pixel_values": noise(1, 3, 256, 256, seed=0)}
    with torch.no_grad(), Largest() as largest, reader.reading(arguments) as reading:
        model.model.get_image_features(**arguments)
    (received,) = reading.pieces[RECEIVED]
    assert received.shape == (1, 4096, 1)
    assert abs(float(received.sum()) - 1.0) < 1e-4
    assert largest.elements <= 2**22 == 2 * 4096 * 4096 // 8


# ------------------------------------------------------------------------------ flash attention


def flash_varlen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend in both directions as flash attention does, packed sequences apart."""
    packed = options.get("cu_seq_lens_q")
    lengths = [query.shape[2]] if packed is None else packed.diff().tolist()
    visible = None if mask is None else mask.bool()[:, None, None]
    parts = [
        scaled_dot_product_attention(*states, attn_mask=visible, scale=options["scaling"])
        for states in zip(*(whole.split(lengths, 2) for whole in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.fixture
def flash() -> Iterator[str]:
    """Register it under a name that transformers takes for flash attention."""
    name = "flash_varlen_on_cpu"
    ALL_ATTENTION_FUNCTIONS.register(name, flash_varlen)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    yield name
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name)
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(name)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
def test_flash_attention_gives_the_same(family: Family, flash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the first block: in transformers 5.17 the encoder of mistral3 itself mixes images under flash attention.
    kinds = ("cls_attention", "cls_logits", "received_attention", "keys", "queries")
    signals = wanted(**{kind: VisionSignal(kind, 0) for kind in kinds})
    cases = [two(family), *([family.batch([3, family.video(1), 2])] if family.has_video else [])]
    before = [tokens for batch in cases for tokens in probe(batch, signals)]
    model = family.model()
    for tower in {model.get_encoder(modality="image"), getattr(model.base_model, "video_tower", None)} - {None}:
        monkeypatch.setattr(tower.config, "_attn_implementation_internal", flash)
    after = [tokens for batch in cases for tokens in probe(batch, signals)]
    for first, second in zip(before, after, strict=True):
        for name in kinds:
            assert torch.allclose(first.signals[name], second.signals[name], atol=2e-5, rtol=1e-4), name


# ------------------------------------------------------------------------- padding and packing


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_padded_patches_neither_look_nor_are_seen(name: str) -> None:
    family = FAMILIES[name]
    batch = family.batch([2, family.image(0, 1), 3])
    visible = torch.ones(1, 1, PIXELS, PIXELS, dtype=torch.long)
    visible[..., PIXELS // 2 :] = 0
    arguments = {**encoding_arguments(family.model(), "image", batch.inputs), "pixel_attention_mask": visible}
    reference = Encoder()
    with recorded(family.model("eager"), "image", reference):
        features(family.model("eager"), "image", arguments)
    model = family.model()
    reader = VisionReader(for_model(model), "image", [Probe(signals=wanted(received=RECEIVED))])
    with reader.reading(arguments) as reading:
        features(model, "image", arguments)
    (seen,) = reference.calls[0]
    patches = 2 * SIDE
    real = (torch.arange(patches**2) % patches) < patches // 2
    expected = seen.weights[0][:, real].mean(dim=(0, 1))
    assert torch.allclose(reading.pieces[RECEIVED][0].flatten(), expected, atol=1e-6)
    assert not expected[~real].any()


class LlavaPixtral(Family):
    """LLaVA with an encoder that takes images of native size, all in one sequence."""

    name, model_class = "llava", "LlavaForConditionalGeneration"
    sizes = 2
    grids = ((3, 5), (4, 2))

    def config(self) -> Any:
        return transformers.LlavaConfig(
            text_config=text_config(model_type="llama"),
            vision_config=vision_config("pixtral", 64, 4, layers=2, head_dim=16),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )

    def image(self, size: int = 0, seed: int = 0) -> Media:
        rows, cols = self.grids[size]
        shown = torch.zeros(1, 3, 16, 20)
        shown[..., : 4 * rows, : 4 * cols] = pixels(1, 3, 4 * rows, 4 * cols, seed=seed)
        return Media(
            "image",
            placeholders("image", rows * cols),
            (Layout.grid(rows, cols),),
            {"pixel_values": shown, "image_sizes": torch.tensor([[4 * rows, 4 * cols]])},
        )


def test_llava_with_images_of_native_size() -> None:
    family = LlavaPixtral()
    batch = two(family)
    signals = {kind: VisionSignal(kind, 0) for kind in ("received_attention", "keys", "patch_features")}
    seen = probe(batch, wanted(**signals))
    assert [tokens.layout.row.max().item() + 1 for tokens in seen] == [3, 4]
    for name, spec in signals.items():
        expected = encoder(batch, "image").expected(spec, 0)
        found = torch.cat([tokens.signals[name] for tokens in seen])
        assert torch.allclose(found.reshape(expected.shape), expected, atol=2e-5)
    with mmfast.accelerate(family.model(), Plan((Returned(keep=4),))) as fast, torch.no_grad():
        family.model()(**batch.inputs)
        assert [record.entered for record in fast.report().media] == [4, 4]


# ------------------------------------------------------------------------------------- windows


class DeepQwen(Qwen25VL):
    """Two of five blocks attend without windows."""

    def vision(self) -> dict[str, Any]:
        return {**super().vision(), "depth": 5, "fullatt_block_indexes": [1, 3]}


def test_attention_is_read_of_blocks_without_windows() -> None:
    family = DeepQwen()
    adapter, batch = for_model(family.model()), two(family)
    specs = [VisionSignal("received_attention", layer) for layer in (0, 1, 2, 3, "features", "last", 0.5)]
    assert [block_of(adapter, "image", spec, {}) for spec in specs] == [1, 1, 1, 3, 3, 3, 1]
    assert block_of(adapter, "image", VisionSignal("keys", 2), {}) == 2
    signals = wanted(second=specs[2], cls=VisionSignal("cls_attention", "last"), keys=VisionSignal("keys", 2))
    seen = probe(batch, signals)
    reference = encoder(batch, "image")
    for (name, spec), block in zip(signals, (1, 3, 2), strict=True):
        expected = reference.expected(spec, block)
        found = torch.cat([tokens.signals[name] for tokens in seen])
        assert torch.allclose(found.reshape(expected.shape), expected, atol=2e-5), name


# ------------------------------------------------------------------------------------ shrinking


class Shrunk(LlavaOnevision):
    """Large images are shrunk to two tiles; frames have an odd number of patches per side."""

    side = 5

    def config(self) -> Any:
        config = super().config()
        config.vision_config.image_size = tile = self.side * PATCH
        config.image_grid_pinpoints = [[tile * rows, tile * cols] for rows, cols in ((1, 2), (2, 1), (3, 2))]
        config.vision_aspect_ratio = "anyres_max_2"
        return config

    def first_prompt(self) -> Batch:
        return self.batch([4])


@pytest.mark.parametrize("modality", ["image", "video"])
def test_signals_shrink_as_features_do(modality: str) -> None:
    """With all else in the model linear, a marked patch shows how much of it a token takes."""
    family = Shrunk()
    model, tile = family.model(), family.side * PATCH
    name = "pixel_values" if modality == "image" else "pixel_values_videos"
    arguments: dict[str, Any] = {name: noise(1, 7 if modality == "image" else 2, 3, tile, tile, seed=3)}
    if modality == "image":
        arguments["image_sizes"] = torch.tensor([[3 * tile, 2 * tile]])
    elif name not in inspect.signature(model.model.get_video_features).parameters:
        arguments = {"pixel_values": arguments[name]}
    spec, patches = VisionSignal("received_attention", 1), VisionSignal("patch_features", 1)
    adapter = for_model(model)
    reader = VisionReader(adapter, modality, [Probe(signals=wanted(received=spec, patches=patches))])
    with torch.no_grad(), reader.reading(arguments) as reading:
        output = features(model, modality, arguments)
    layouts = adapter.layouts(modality, arguments, [output])
    described = reader.describe(reading, arguments, [output], layouts)
    share = _shares(model, modality, arguments)
    mixtures = (share.abs() > 1e-4).sum(dim=1) > 1
    assert bool(mixtures.any())
    assert not described.projections[0]
    newline = layouts[0].is_newline
    for asked in (spec, patches):
        found = described.signals[0][asked].reshape(len(newline), -1)
        # transformers 5.17 adds the newline of a video later.
        assert torch.allclose(found[: len(share)], share @ reading.rows(asked).flatten(0, 1), atol=1e-4)
        assert not found[newline].any()


def _shares(model: Any, modality: str, arguments: dict[str, Any]) -> Tensor:
    """Return ``[tokens, patches]``: how much of each patch goes into each token."""
    projector, entered = model.model.multi_modal_projector, []
    activation, projector.act = projector.act, nn.Identity()
    try:
        with unmixed(model, modality, entered), torch.no_grad():
            before = features(model, modality, arguments)
            rows = entered.pop()
            share = torch.zeros(len(before), len(rows))
            for changed in marks(arguments, PATCH):
                after = features(model, modality, changed) - before
                moved = entered.pop() - rows
                (row,) = moved.abs().amax(-1).nonzero().flatten().tolist()
                whole = projector(rows[row] + moved[row]) - projector(rows[row])
                share[:, row] = after @ whole / whole.square().sum()
    finally:
        projector.act = activation
    return share


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
def test_what_an_encoder_has_not_is_refused(family: Family) -> None:
    model = family.model()
    own = {"llava", "vipllava", "llava_next", "llava_next_video", "video_llava", "internvl"}
    method = Probe(keep=0.5, signals=wanted(cls=VisionSignal("cls_features")))
    if family.name in own:
        mmfast.accelerate(model, Plan((method,))).remove()
    else:
        with pytest.raises(ValueError, match="has no class token"):
            mmfast.accelerate(model, Plan((method,)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (VisionSignal("keys", 3), r"layer=3 must be .* index in 0\.\.2 .*3 blocks"),
        (VisionSignal("keys", -1), "layer=-1"),
        (VisionSignal("keys", 1.0), "layer=1.0"),
        (VisionSignal("keys", True), "layer=True"),
        (VisionSignal("keys", "first"), "layer='first'"),  # type: ignore[arg-type]
        (VisionSignal("keys", 0, "max"), "heads='max'"),  # type: ignore[arg-type]
        (VisionSignal("values"), "kind='values'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_signals_are_refused(spec: VisionSignal, message: str) -> None:
    with pytest.raises(ValueError, match=f"method 'probe', signal 'mine': {message}"):
        mmfast.accelerate(FAMILIES["llava"].model(), Plan((Probe(signals=wanted(mine=spec)),)))


def test_features_of_the_class_token_stay_outside_the_llm() -> None:
    method = InnerProbe(signals=wanted(cls=VisionSignal("cls_features")))
    with pytest.raises(ValueError, match="before the LLM only"):
        mmfast.accelerate(FAMILIES["llava"].model(), Plan((method,)))


def test_encoders_that_hide_their_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llava"].model()
    monkeypatch.setattr(model.get_encoder(modality="image").config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(ValueError, match="'flex_attention'"):
        mmfast.accelerate(model, Plan((Probe(signals=wanted(received=RECEIVED)),)))
    mmfast.accelerate(model, Plan((Probe(signals=wanted(patches=VisionSignal("patch_features"))),))).remove()


# ---------------------------------------------------------------------- how signals come along


@pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(transformers.LlavaForConditionalGeneration.forward).parameters,
    reason="this transformers takes no features made before",
)
def test_features_made_before() -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), family.batch([2, family.image(), 3])
    inputs = batch.inputs
    own = wanted(received=RECEIVED)

    def encode() -> dict[str, Any]:
        with torch.no_grad():
            return {"image": model.model.get_image_features(inputs["pixel_values"], return_dict=True)}

    def run(encoded: dict[str, Any]) -> None:
        model(inputs["input_ids"], attention_mask=inputs["attention_mask"], mm_encoder_outputs=encoded)

    before = encode()
    with mmfast.accelerate(model, "uniform(keep=3)"):
        other = encode()
    with mmfast.accelerate(model, Plan((Probe(keep=3, signals=own),))):
        run(encode())
        run(copy.deepcopy(encode()))
        for encoded in (before, other):
            with pytest.raises(ValueError, match=r"encode the media after accelerate\(\)"):
                run(encoded)


def test_copies_of_features_do_not_copy_the_model() -> None:
    described = Described([Layout.grid(1, 1)])
    reader = VisionReader(for_model(FAMILIES["llava"].model()), "image", [Probe()])
    described.projections[0][RECEIVED] = reader._project
    copied = copy.deepcopy(described)
    assert copied.projections[0][RECEIVED] is reader._project
    assert len(copied) == len(copied.signals) == 1


def test_signals_are_let_go_after_the_prompt() -> None:
    family = FAMILIES["llava"]
    signals = wanted(keys=VisionSignal("keys", 0, "join"), patches=VisionSignal("patch_features"))
    batch = family.batch([2, family.image(), 3])
    Probe.seen.clear()
    with mmfast.accelerate(family.model(), Plan((Probe(keep=3, signals=signals),))) as fast, torch.no_grad():
        family.model()(**batch.inputs)
        gc.collect()
        holders = [thing for thing in gc.get_objects() if type(thing) in (Segment, Described)]
        assert fast.report().media
    assert Segment in map(type, holders)
    assert not any(any(holder.signals) for holder in holders)


def test_two_methods_may_use_one_name() -> None:
    family = FAMILIES["llava"]
    batch = family.batch([2, family.image(), 3])
    first, second = VisionSignal("keys", 0), VisionSignal("keys", 1)
    plan = Plan((Probe(keep=20, signals=wanted(mine=first)), InnerProbe(signals=wanted(mine=second))))
    Probe.seen.clear()
    InnerProbe.seen.clear()
    with mmfast.accelerate(family.model(), plan), torch.no_grad():
        family.model()(**batch.inputs)
    for tokens, spec, count in ((Probe.seen[0], first, 25), (InnerProbe.seen[0], second, 20)):
        assert torch.equal(tokens.signals["mine"], probe(batch, wanted(mine=spec))[0].signals["mine"][:count])


def test_a_call_may_choose_another_layer() -> None:
    family = FAMILIES["llava"]
    model, batch = family.model(), family.batch([2, family.image(), 3])
    signals = wanted(patch_features=VisionSignal("patch_features"), third=VisionSignal("patch_features", 2))
    Probe.seen.clear()
    with mmfast.accelerate(model, Plan((Probe(keep=3, signals=signals),))), torch.no_grad():
        model(**batch.inputs, vision_feature_layer=-1)
    (tokens,) = Probe.seen
    assert torch.equal(tokens.signals["patch_features"], tokens.signals["third"])
    assert tokens.projectable
