"""Sliding windows measure places as they were before anything was dropped, in whichever layers they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers

import mmfast
from support.cases import case_id, mixed, one, two
from support.checks import census, check_against_reference, generate
from support.families import FAMILIES, Batch, Family
from support.families.base import HEADS, HIDDEN, text_config, vision_config
from support.families.llava import Llava
from support.prompts import IMAGE

WINDOW = 8


class AllLayersSlide(Llava):
    """A Mistral decoder, all of whose layers have the window."""

    renumbers, window = False, WINDOW

    def config(self) -> Any:
        return transformers.LlavaConfig(
            text_config=text_config(model_type="mistral", sliding_window=WINDOW, head_dim=HIDDEN // HEADS),
            vision_config=vision_config("clip_vision_model", 20, 4),
            image_token_index=IMAGE,
        )


class SomeLayersSlide(Llava):
    """A Qwen2 decoder that makes a mask for each kind of layer itself."""

    renumbers, window = False, WINDOW

    def config(self) -> Any:
        full, sliding = "full_attention", "sliding_attention"
        return transformers.LlavaConfig(
            text_config=text_config(
                model_type="qwen2",
                use_sliding_window=True,
                sliding_window=WINDOW,
                layer_types=[full, full, sliding, full, sliding],
            ),
            vision_config=vision_config("clip_vision_model", 20, 4),
            image_token_index=IMAGE,
        )


SLIDING = [AllLayersSlide(), SomeLayersSlide(), FAMILIES["gemma3"]]
PLANS = [
    "divprune(keep=0.4)",
    "pool2d(keep=0.4)",
    "fastv(keep=0.4)",
    "fastv(keep=0.4, layer=3)",
    "uniform(keep=0.6) + pyramiddrop(keep=0.25)",
]


def named(value: object) -> str | None:
    return type(value).__name__ if isinstance(value, Family) else case_id(value)


@pytest.mark.parametrize("family", SLIDING, ids=named)
@pytest.mark.parametrize("case", [one, two, mixed], ids=named)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_windows(family: Family, case: Callable[[Family], Batch], plan: str, attention: str) -> None:
    """Twelve steps, so that the window leaves the prompt behind."""
    check_against_reference(case(family), plan, attention, steps=12)


@pytest.mark.parametrize("family", SLIDING, ids=named)
@pytest.mark.parametrize("method", ["uniform", "fastv"])
def test_positions_stay_as_they_are(family: Family, method: str) -> None:
    model = family.model()
    stock = census(model)
    with pytest.raises(
        ValueError, match=r"positions='compact' is not possible .* its windows count original positions"
    ):
        mmfast.accelerate(model, f"{method}(positions='compact')")
    assert census(model) == stock


@pytest.mark.parametrize("family", SLIDING, ids=named)
def test_a_short_prompt_inside_the_window(family: Family) -> None:
    """Text alone, first shorter and then longer than the window: nothing changes."""
    model, batch = family.model(), family.batch([3], [5])
    before = generate(model, batch.inputs, 12)
    with mmfast.accelerate(model, PLANS[-1]):
        during = generate(model, batch.inputs, 12)
    assert (before.logits == during.logits).all()
