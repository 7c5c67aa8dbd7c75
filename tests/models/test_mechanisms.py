"""What the runner can do that no method needs to exist for: calibration, truncated caches, decode routing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast.registry import register, unregister
from mmfast.token_pruning.base import Merger
from mmfast.token_pruning.layers import DropOnce, LayerBypass, LayerEvent, LayerTokens, Route
from mmfast.tokens import Keep, VisualTokens
from support.cases import mixed
from support.checks import CLOSE, FAR, census, generate
from support.families import FAMILIES, Family
from support.reference import decoder_inputs, items_of


@dataclass(frozen=True)
class Weighty(Merger):
    """Every second token, as if it stood for many."""

    keep: int | float | None = 4
    calibrate: bool | None = True

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        places = torch.arange(kept) * 2
        return Keep(places, tokens.features[places] * 1.5, 3.0 * torch.arange(1, kept + 1))


@dataclass(frozen=True)
class Cut(DropOnce):
    """The first tokens; the first of them becomes the mean of all. Earlier caches may be cut as well."""

    cut_caches: bool = False

    def truncations(self, depth: int) -> list[tuple[int, int, int]]:
        return [(2, 0, 2)] if self.cut_caches else []

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Keep:
        assert kept is not None
        features = torch.full((kept, tokens.hidden.shape[1]), float("nan"))
        features[0] = tokens.hidden[tokens.candidates].mean(dim=0)
        return Keep(torch.arange(kept), features)


@dataclass(frozen=True)
class Sometimes(LayerBypass):
    """Every second visual token, and generated ones by the sign of one feature, go through layers 1 and 3."""

    routes_decode = True
    needs = frozenset({"layer_norm"})

    def layers_of(self, depth: int) -> list[int]:
        return [1, 3]

    def route(self, tokens: LayerTokens, layer: int, depth: int) -> Route:
        return Route(torch.arange(0, tokens.candidates.numel(), 2))

    def decode_route(self, normed: Tensor, layer: int) -> Tensor:
        return (normed[:, 0] > 0) * 0.5

    def keep_counts(self, visual: int, text: int, depth: int, images: int = 1) -> None:
        return None


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    kinds = {"weighty": (Weighty, "before_llm"), "cut": (Cut, "in_llm"), "sometimes": (Sometimes, "in_llm")}
    for name, (kind, stage) in kinds.items():
        register(name, stage=stage)(kind)
    yield
    for name in kinds:
        unregister(name)


ONE_DIMENSIONAL = [FAMILIES[name] for name in ("llava", "internvl", "llava_next")]


def alone_and_together(family: Family, plan: str, attention: str, steps: int = 4) -> tuple[Any, mmfast.Report]:
    """Generate for a batch and check that each row comes out as it does alone."""
    model, batch = family.model(attention), mixed(family)
    stock = census(model)
    with mmfast.accelerate(model, plan) as fast:
        done, report = generate(model, batch.inputs, steps), fast.report()
        for row in range(len(batch)):
            alone = generate(model, batch.alone(row).inputs, steps)
            assert (alone.logits[0] - done.logits[row]).abs().max() < CLOSE
    assert census(model) == stock
    return done, report


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ONE_DIMENSIONAL[:2], ids=lambda family: family.name)
def test_attention_is_calibrated_by_size_and_distance(family: Family, attention: str) -> None:
    """Against masks written by hand, and from the cache as without one."""
    done, _ = alone_and_together(family, "weighty(positions='keep')", attention)
    batch = mixed(family).alone(1)
    model = family.model("eager")
    (item,) = items_of(batch)
    embeds = decoder_inputs(model, batch.inputs)["inputs_embeds"].clone()
    kept = item.slots[torch.arange(4) * 2]
    embeds[0, kept] *= 1.5
    stays = torch.ones(embeds.shape[1], dtype=torch.bool)
    stays[item.slots] = False
    stays[kept] = True
    sizes = torch.ones(embeds.shape[1])
    sizes[kept] = 3.0 * torch.arange(1, 5)
    ids = batch.ids[0] + done.tokens[1, :-1].tolist()
    extra = len(ids) - len(batch.ids[0])
    stays = torch.cat([stays, torch.ones(extra, dtype=torch.bool)])
    sizes = torch.cat([sizes, torch.ones(extra)])[stays]
    embeds = torch.cat([embeds[0], model.get_input_embeddings()(done.tokens[1, :-1])])[None, stays]
    places = stays.nonzero().squeeze(-1)
    frequencies = model.get_decoder().rotary_emb.inv_freq
    decay = torch.cos((places[:, None] - places).abs()[..., None] * frequencies).mean(dim=-1)
    visible = places <= places[:, None]
    mask = (sizes.log() + (2 - decay).log()).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        hidden = model.get_decoder()(
            inputs_embeds=embeds, position_ids=places[None], attention_mask=mask, use_cache=False
        ).last_hidden_state
        wanted = model.lm_head(hidden)[0, -extra - 1 :]
    assert (wanted - done.logits[1]).abs().max() < CLOSE
    plain, _ = alone_and_together(family, "weighty(positions='keep', calibrate=False)", attention)
    assert (plain.logits - done.logits)[:2, 0].abs().max() > FAR


def test_calibration_is_refused_where_it_cannot_hold() -> None:
    for name in ("qwen2_5_vl", "gemma3"):
        with pytest.raises(ValueError, match="calibrate=True needs a model with one-dimensional rotary positions"):
            mmfast.accelerate(FAMILIES[name].model(), "weighty()")
        # Where possible is not here.
        mmfast.accelerate(FAMILIES[name].model(), "weighty(calibrate=None)").remove()
    for beside in ("cut()", "knorm(keep=0.5)"):
        with pytest.raises(ValueError, match="no method inside the language model or its cache beside it"):
            mmfast.accelerate(FAMILIES["llava"].model(), f"weighty() + {beside}")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "internvl"])
def test_earlier_caches_are_cut_to_the_survivors(name: str) -> None:
    """The first token is what it was; later ones no longer see what went, in any layer."""
    family = FAMILIES[name]
    whole, report = alone_and_together(family, "cut(keep=4)", "sdpa")
    short, shorter = alone_and_together(family, "cut(keep=4, cut_caches=True)", "sdpa")
    assert torch.equal(whole.logits[:, 0], short.logits[:, 0])
    assert (whole.logits - short.logits)[:2, 1:].abs().max() > FAR
    per_token = report.shape.kv_bytes([1], 4)
    rows = len(report.tokens_per_layer)
    padded = max(layers[-1] for layers in report.tokens_per_layer)
    assert shorter.kv_bytes == rows * padded * report.shape.layers * per_token


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_generated_tokens_may_go_around_layers(name: str) -> None:
    family = FAMILIES[name]
    done, _ = alone_and_together(family, "sometimes()", "sdpa", steps=8)
    stays = pytest.MonkeyPatch()
    with stays.context() as patch:
        patch.setattr(Sometimes, "routes_decode", False)
        dense, _ = alone_and_together(family, "sometimes()", "sdpa", steps=8)
    assert torch.equal(done.logits[:, 0], dense.logits[:, 0])
    assert (done.logits - dense.logits)[:2].abs().max() > FAR


def test_a_plan_holds_one_method_of_each_role() -> None:
    mmfast.Plan.parse("cut() + sometimes()")
    with pytest.raises(ValueError, match="both act at stage 'in_llm'"):
        mmfast.Plan.parse("cut() + fastv()")
