"""Compiled decoding gives what decoding gives, and leaves the cache that decoding leaves.

These tests run the very steps that are compiled, without compiling them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmfast.adapters import compiled, compiled_step
from support.against_plain import unsaid
from support.cases import case_id, mixed, one, text_only, two, video
from support.checks import Generated, generate
from support.compiled_steps import BOTH, STEPS, answers, both, check_alike
from support.families import FAMILIES, Family
from support.prompts import text

PLANS = {
    "none": "full",
    "before": "divprune(keep=0.4)",
    "inside": "fastv(keep=0.4)",
    "evict": "snapkv(keep=0.4, window=4)",
    "merge": "lookm(keep=0.4)",
    "ragged": 'adakv(keep=0.4, scorer="snapkv(window=4)")',
    "weighted": "snapkv(keep=0.4, window=4) + kv_merging()",
    "renumbered": 'fastv(keep=0.4, positions="compact")',
    "sizes": "anchor_merge(keep=0.4)",
    "around": "shortv(keep=0.6)",
}
NAMES = ["llava", "qwen2_5_vl", "gemma3"]

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=case_id)
some_families = pytest.mark.parametrize("family", [FAMILIES[name] for name in NAMES], ids=case_id)
llava = FAMILIES["llava"]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run steps as they are."""
    monkeypatch.setattr(compiled_step, "compiled", lambda step: step)


# ----------------------------------------------------------------------------- the same


@every_family
def test_same_tokens(family: Family) -> None:
    expected, found = both(family.model(), BOTH, lambda model: answers(model, mixed(family)))
    assert torch.equal(expected, found)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in NAMES for kind in PLANS if name == "llava" or kind not in ("renumbered", "sizes")],
)
def test_same_logits_and_cache(name: str, kind: str) -> None:
    family = FAMILIES[name]
    check_alike(*both(family.model(), PLANS[kind], lambda model: generate(model, mixed(family).inputs, STEPS)))


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.has_video], ids=case_id)
def test_videos(family: Family) -> None:
    plan = "uniform(keep=0.5) + lookm(keep=0.5)"
    check_alike(*both(family.model(), plan, lambda model: generate(model, video(family).inputs, STEPS)))


@some_families
def test_text_alone_and_eager_attention(family: Family) -> None:
    batch = text_only(family)
    check_alike(*both(family.model("eager"), BOTH, lambda model: generate(model, batch.inputs, STEPS)))


def test_same_in_half_precision() -> None:
    """Sums in another order may round otherwise, but no further."""
    model = FAMILIES["qwen2_5_vl"].model(dtype=torch.bfloat16)
    inputs = two(FAMILIES["qwen2_5_vl"]).inputs
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    expected, found = both(model, "snapkv(keep=0.4, window=4)", lambda model: generate(model, inputs, 2))
    assert torch.equal(expected.logits[:, 0], found.logits[:, 0])
    assert (expected.logits[:, 1] - found.logits[:, 1]).abs().max() < 0.05 * expected.logits.abs().max()


@some_families
@pytest.mark.parametrize("plan", ["full", BOTH], ids=["none", "both"])
def test_a_second_turn(family: Family, plan: str) -> None:
    """It goes on from what the compiled steps have left."""
    batch = family.batch([2, family.image(0, 1), 3], [4, family.image(family.sizes - 1, 2), 5])
    plain = unsaid(family.model())

    def talk(model: Any) -> Generated:
        first = generate(model, batch.inputs, 5, **plain)
        ids = torch.cat([batch.inputs["input_ids"], first.tokens, torch.tensor([text(4, 9)] * 2)], dim=1)
        mask = batch.inputs["attention_mask"]
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.output.past_key_values}
        return generate(model, turn, STEPS, **plain)

    check_alike(*both(family.model(), plan, talk))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no-grad", "inference"])
def test_a_static_cache(mode: Any) -> None:
    options = {"cache_implementation": "static"}

    def run(model: Any) -> Generated:
        with mode():
            return generate(model, mixed(llava).inputs, STEPS, **options)

    check_alike(*both(llava.model(), BOTH, run))


def test_embeddings_instead_of_ids() -> None:
    inputs = mixed(llava).inputs
    embeds = llava.model().get_input_embeddings()(inputs.pop("input_ids")).detach()
    run = {**inputs, "inputs_embeds": embeds}
    check_alike(*both(llava.model(), BOTH, lambda model: generate(model, run, STEPS)))


def test_more_tokens_than_there_is_room_for_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_ROOM", 64)
    expected, found = both(llava.model(), BOTH, lambda model: answers(model, mixed(llava), 75))
    assert torch.equal(expected, found)
    check_alike(*both(llava.model(), BOTH, lambda model: generate(model, one(llava).inputs, 75)))
