"""Calibration: what a bench answers, what methods make of it, and that the model stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mmfast
from mmfast.budget import LanguageShape
from mmfast.calibration import calibrate
from mmfast.plan import Plan
from mmfast.registry import register, unregister
from mmfast.token_pruning.base import Method
from mmfast.token_pruning.calibrating import Look
from mmfast.token_pruning.in_llm.shortv import ShortV
from mmfast.token_pruning.in_llm.uniform_in_llm import UniformInLLM
from mmfast.token_pruning.in_llm.vtw import VTW
from support.cases import mixed, one, text_only, two
from support.checks import census, first_logits, registries
from support.families import FAMILIES

LLAVA = FAMILIES["llava"]


@dataclass
class GivenBench:
    """A bench whose divergences are given, by layer; it notes what is tried."""

    moved: list[float]
    tried: list[Method] = field(default_factory=list)

    @property
    def shape(self) -> LanguageShape:
        return LanguageShape(len(self.moved), 8, 8, 2, 2, 4)

    def divergence(self, method: Method) -> float:
        self.tried.append(method)
        layer = method.layer if isinstance(method, VTW) else method.order[0]
        return self.moved[layer]

    def watch(self, look: Look) -> None:
        raise AssertionError("neither method watches")


def test_vtw_takes_the_first_layer_within_the_tolerance() -> None:
    moved = [9.0] * 15 + [0.0004] + [0.1] * 16
    bench = GivenBench(moved)
    assert VTW(tolerance=0.0005, scope="per_image").calibrated(bench, None) == VTW(layer=15, scope="per_image")
    assert [method.layer for method in bench.tried] == list(range(5, 16))


def test_vtw_drops_nothing_where_every_layer_needs_the_tokens() -> None:
    found = VTW(layer=2).calibrated(GivenBench([1.0] * 8), None)
    assert found == VTW(keep=1.0)
    assert found.keep_counts(10, 0, 8) == [10] * 8


def test_vtw_finds_the_budget_itself() -> None:
    with pytest.raises(ValueError, match=r"keep=0\.5: the calibration of 'vtw' finds it"):
        VTW().calibrated(GivenBench([0.0] * 8), 0.5)


def test_shortv_ranks_layers_frozen_one_by_one() -> None:
    bench = GivenBench([0.3, 0.1, 0.9, 0.1])
    assert ShortV(order="llava-1.5-7b").calibrated(bench, None) == ShortV(order=(1, 3, 0, 2))
    assert [method.frozen(10, 4) for method in bench.tried] == [[0], [1], [2], [3]]
    assert ShortV().calibrated(bench, 0.25).keep == 0.25


@pytest.fixture
def samples() -> list[dict[str, Any]]:
    return [one(LLAVA).inputs, mixed(LLAVA).inputs]


def divergence(samples: list[dict[str, Any]], plan: str, without: str = "full") -> float:
    """Mean over all prompts of the last token's divergence, straight from the definition."""
    model, found = LLAVA.model(), []
    for inputs in samples:
        with mmfast.accelerate(model, without):
            before = first_logits(model, inputs).double().log_softmax(dim=-1)
        with mmfast.accelerate(model, plan):
            after = first_logits(model, inputs).double().log_softmax(dim=-1)
        found += (before.exp() * (before - after)).sum(dim=-1).tolist()
    return sum(found) / len(found)


def test_shortv_on_a_model(samples: list[dict[str, Any]], tmp_path: Path) -> None:
    model = LLAVA.model()
    stock, tables = census(model), registries()
    path = tmp_path / "plan.toml"
    found = calibrate(model, "shortv()", samples, keep=0.4, path=path)
    moved = [divergence(samples, f"shortv(keep=0.8, order=({layer},))") for layer in range(5)]
    assert min(abs(a - b) for a in moved for b in moved if a != b) > 1e-6
    assert found == Plan((ShortV(keep=0.4, order=tuple(sorted(range(5), key=moved.__getitem__))),))
    assert Plan.of(path) == found
    assert census(model) == stock
    assert registries() == tables


def test_vtw_on_a_model_beside_another_method(samples: list[dict[str, Any]]) -> None:
    """What the other method does is no fault of this one: both sides of the comparison have it."""
    others = "uniform(keep=0.4)"
    moved = [divergence(samples, f"{others} + vtw(layer={layer})", others) for layer in range(1, 5)]
    tolerance = sorted(moved)[1] * 1.0001
    layer = next(layer for layer, value in enumerate(moved, 1) if value <= tolerance)
    found = calibrate(LLAVA.model(), f"{others} + vtw(tolerance={tolerance!r})", iter(samples), path=None)
    assert found.to_text() == f"{others} + vtw(layer={layer}, tolerance={tolerance!r})"


def test_padding_on_the_right_is_no_last_token() -> None:
    model, batch = LLAVA.model(), one(LLAVA)
    ids = batch.inputs["input_ids"]
    padded = {
        **batch.inputs,
        "input_ids": torch.cat([ids, torch.zeros_like(ids[:, :3])], dim=1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :3])], dim=1),
    }
    plan = f"vtw(tolerance={divergence([batch.inputs], 'vtw(layer=2)') * 1.001!r})"
    assert calibrate(model, plan, [padded]) == calibrate(model, plan, [batch.inputs])


@pytest.fixture
def watcher() -> Iterator[list[tuple[int, int, torch.Tensor]]]:
    """Register a method that only watches; return what it has seen."""
    seen: list[tuple[int, int, torch.Tensor]] = []

    @register("watcher", stage="in_llm")
    @dataclass(frozen=True)
    class Watcher(UniformInLLM):
        """Note what is shown."""

        def calibrated(self, bench: Any, keep: float | None) -> Method:
            everything = lambda tokens: torch.arange(tokens.hidden.shape[0])  # noqa: E731
            bench.watch(
                lambda tokens, event: seen.append(
                    (event.layer, tokens.candidates.numel(), tokens.view().rows(everything(tokens)))
                )
            )
            return replace(self, keep=3 if keep is None else keep)

    yield seen
    unregister("watcher")


def test_watching_shows_every_prompt_with_media_at_every_layer(watcher: list[tuple[int, int, torch.Tensor]]) -> None:
    model = LLAVA.model("eager")
    found = calibrate(model, "watcher()", [two(LLAVA).inputs, text_only(LLAVA).inputs])
    assert found.to_text() == "watcher(keep=3)"
    assert [(layer, count) for layer, count, _ in watcher] == [(layer, 50) for layer in range(1, 5)]
    with torch.no_grad():
        weights = model(**two(LLAVA).inputs, output_attentions=True).attentions
    for layer, _, rows in watcher:
        torch.testing.assert_close(rows, weights[layer - 1][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("plan", "samples", "keep", "message"),
    [
        ("fastv()", [{}], None, "nothing in plan 'fastv()' can be calibrated; these can: .*shortv, vtw"),
        ("full", [{}], None, "nothing in plan 'full' can be calibrated"),
        ("vtw() + shortv()", [{}], 0.5, "keep=0.5 is the budget of one method, but 2 of plan"),
        ("vtw()", [], None, "samples is empty"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    plan: str, samples: list[dict[str, Any]], keep: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("()", r"\(\)")):
        calibrate(LLAVA.model(), plan, samples, keep=keep)


def test_a_model_in_training_is_refused() -> None:
    model = LLAVA.model().train()
    try:
        with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
            calibrate(model, "vtw()", [one(LLAVA).inputs])
    finally:
        model.eval()


def test_a_failing_prompt_leaves_nothing() -> None:
    model = LLAVA.model()
    stock = census(model)
    with pytest.raises(Exception, match="input_ids"):
        calibrate(model, "vtw()", [one(LLAVA).inputs, {"input_ids": None, "inputs_embeds": None}])
    assert census(model) == stock
