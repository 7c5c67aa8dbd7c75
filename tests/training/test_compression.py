"""Learning to read images through compression tokens: mechanics on CPU, and a proof with --slow."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import mmfast
from mmfast.adapters import load_pretrained
from mmfast.adapters.compression import compression_tokens
from mmfast.training.compression import Compression, distillation
from mmfast.training.conversations import WorldSource
from mmfast.training.recipe import Recipe
from mmfast.training.settings import Settings
from mmfast.training.supervised import IGNORED
from mmfast.training.trainer import train

needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="training needs accelerate (extra train)")
SETTINGS = Settings(steps=2, batch=2, learning_rate=1e-3, warmup=0, checkpoint_every=1)


def objective(**options: Any) -> Compression:
    """The embedded model, to learn colours."""
    model, processor = mmfast.load_default(dtype="float32")
    return Compression(model, processor, WorldSource(families=["color"]), **options)


def test_one_count_is_drawn_for_each_step_and_part() -> None:
    learns = objective(tokens=[1, 4], loss="ce+kd")
    drawn = []
    for step in range(6):
        for part in range(2):
            shown = learns.batch(step, part, 2, 1)
            plain = shown.plain
            assert plain is not None
            token = compression_tokens(learns.processor)
            assert token is not None
            drawn.append(int((shown.inputs["input_ids"] == token.token_id).sum()))
            assert not bool((plain.inputs["input_ids"] == token.token_id).any())
            kept = shown.labels[shown.labels != IGNORED].tolist()
            assert kept == plain.labels[plain.labels != IGNORED].tolist()
    assert drawn[::2] == drawn[1::2]
    assert set(drawn) == {1, 4}


def test_the_loss_is_cross_entropy_and_distance_from_the_teacher() -> None:
    learns = objective(tokens=2, loss="ce+kd", kd_weight=0.5, temperature=2.0)
    model = copy.deepcopy(mmfast.load_default(dtype="float32")[0])
    shown = learns.batch(0, 0, 1, 2)
    plain = shown.plain
    assert plain is not None
    loss = learns(shown, 0.0)
    with torch.no_grad():
        # The teacher is the model as it was; the student sees what the plan lets it see.
        wanted = model(**plain.inputs).logits[:, :-1][plain.labels[:, 1:] != IGNORED] / 2.0
        given = learns.model(**shown.inputs, use_cache=False).logits[:, :-1][shown.labels[:, 1:] != IGNORED]
        plan = learns.fast.report().plan if learns.fast is not None else ""
    assert plan == "voco(hide_prefix='all')"
    width = min(wanted.shape[1], given.shape[1])
    p, q = wanted[:, :width].softmax(dim=-1), (given[:, :width] / 2.0).softmax(dim=-1)
    distance = 4.0 * (p * (p.log() - q.log())).sum(dim=-1).mean()
    entropy = functional.cross_entropy(given, shown.labels[:, 1:][shown.labels[:, 1:] != IGNORED])
    assert loss.total.item() == pytest.approx((entropy + 0.5 * distance).item(), rel=1e-4)
    assert loss.figures["kd"] == pytest.approx(distance.item(), rel=1e-4)
    assert distillation(given, given).item() == pytest.approx(0.0, abs=1e-6)


def test_tokens_are_asked_to_look_at_their_own_parts() -> None:
    learns = objective(tokens=4, distinct=True, part_weight=0.5, part_share=0.6, part_layers=2)
    batch = learns.batch(0, 0, 1, 2)
    asked, later = learns(batch, 0.5), learns(batch, 0.6)
    assert set(later.figures) == {"tokens_right", "ce"}
    assert asked.figures["ce"] == later.total.item() == later.figures["ce"]
    assert asked.total.item() == pytest.approx(asked.figures["ce"] + 0.5 * asked.figures["parts"], rel=1e-6)
    # The same by hand, from the weights that eager attention gives out under the mask of the plan.
    known = compression_tokens(learns.model)
    assert known is not None
    weights: list[torch.Tensor] = []
    learns.model.set_attn_implementation("eager")  # type: ignore[operator]
    layers: Any = learns.model.model.language_model.layers  # type: ignore[union-attr]
    handles = [
        layer.self_attn.register_forward_hook(lambda *given: weights.append(given[2][1].detach()))
        for layer in layers[:2]
    ]
    with torch.no_grad():
        learns.model(**batch.inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    ids = batch.inputs["input_ids"]
    masses = []
    for attention in weights:
        for row in range(2):
            tokens = known.find(ids[row]).nonzero().flatten()
            image = (ids[row] == learns.processor.image_token_id).nonzero().flatten().view(16, 16)
            parts = [image, image, image[:8], image[8:]]
            masses += [attention[row, :, t, p.flatten()].sum(-1) for t, p in zip(tokens, parts, strict=True)]
    expected = -(torch.cat(masses) + 1e-4).log().mean()
    assert asked.figures["parts"] == pytest.approx(float(expected), rel=1e-4)
    asked.total.backward()  # type: ignore[no-untyped-call]
    rows = learns.model.get_input_embeddings().weight.grad[known.token_id : known.token_id + 4]  # type: ignore[operator]
    assert bool((rows.abs().sum(dim=1) > 0).all())


def test_parts_are_refused_where_layers_run_again() -> None:
    learns = objective(tokens=2, part_weight=0.1).train()
    learns.model.gradient_checkpointing_enable()  # type: ignore[operator]
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        learns(learns.batch(0, 0, 1, 1), 0.0)


@needs_accelerate
def test_what_learns_and_what_does_not(tmp_path: Path) -> None:
    learns = objective(tokens=2, loss="ce+kd")
    assert learns.teacher is not None
    before = {name: value.detach().clone() for name, value in learns.state_dict().items()}
    train(learns, SETTINGS, tmp_path, progress=False)
    changed = {name for name, value in learns.state_dict().items() if not torch.equal(value, before[name])}
    assert any("language_model" in name for name in changed)
    assert any("projector" in name for name in changed)
    assert not any("teacher" in name or "vision_tower" in name for name in changed)
    assert not learns.teacher.training


@needs_accelerate
def test_a_run_that_was_broken_off_ends_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokens": [1, 2], "loss": "ce+kd"}
    whole = train(objective(**options), SETTINGS, tmp_path / "whole", progress=False)
    train(objective(**options), SETTINGS, tmp_path / "parts", stop_after=1, progress=False)
    parts = train(objective(**options), SETTINGS, tmp_path / "parts", progress=False)
    assert parts["loss"] == whole["loss"]


@needs_accelerate
def test_the_recipe_exports_what_loads(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "recipes" / "voco.toml"
    changes = {"settings.steps": 1, "settings.batch": 1, "settings.warmup": 0, "objective.loss": "ce"}
    recipe = Recipe.read(path, changes)
    train(recipe.build(), recipe.settings, tmp_path, progress=False)
    model, processor = load_pretrained(tmp_path, progress=False)
    known = compression_tokens(model)
    assert known is not None
    assert known == compression_tokens(processor)
    assert (known.tokens, known.entries, known.hide_prefix) == (16, 16, "all")
    with mmfast.accelerate(model, "voco()") as fast:
        assert fast.report().plan == "voco(hide_prefix='all')"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": []}, r"tokens=\[\]"),
        ({"loss": "kd"}, "loss='kd'"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"kd_weight": -1.0}, r"kd_weight=-1\.0"),
        ({"trained": "lm"}, "trained='lm'"),
        ({"distinct": "no"}, "distinct='no'"),
        ({"part_weight": -0.1}, r"part_weight=-0\.1"),
        ({"part_share": 1.5}, r"part_share=1\.5"),
        ({"part_layers": 0}, "part_layers=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(**options)
