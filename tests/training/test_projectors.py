"""Teaching projectors: what a step's loss is, what is trained, and that what is exported is what was learned."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import mmfast
from mmfast.training.conversations import Conversation, WorldSource
from mmfast.training.projectors import Projectors
from mmfast.training.recipe import Recipe
from mmfast.training.settings import Settings
from mmfast.training.supervised import Supervised
from mmfast.training.trainer import train

pytest.importorskip("accelerate", reason="training needs accelerate (extra train)")

RECIPE = Path(__file__).parents[2] / "recipes" / "matryoshka.toml"


@cache
def embedded() -> tuple[Any, Any]:
    return mmfast.load_default(dtype="float32")


def projectors(**options: Any) -> Projectors:
    model, processor = embedded()
    return Projectors(model, processor, WorldSource(families=["color"]), **options)


def test_the_loss_is_the_mean_over_all_counts() -> None:
    taught = projectors(method="m3_pool()", keep=[4, 64, 256], trained="projector")
    batch = taught.batch(0, 0, 1, 2)
    loss = taught(batch, 0.0)
    model, processor = embedded()
    alone = []
    for plan in ("m3_pool(keep=4)", "m3_pool(keep=64)", ""):
        one = Supervised(model, processor, taught.source, plan=plan, trained="projector")
        alone.append(one(batch[0], 0.0).total.detach())
        if one.fast is not None:
            one.fast.remove()
    torch.testing.assert_close(loss.total.detach(), torch.stack(alone).mean())
    assert alone[0] != alone[1]
    assert set(loss.figures) == {"tokens_right_4", "tokens_right_64", "tokens_right_256"}
    assert all("projector" in name for name, weight in taught.named_parameters() if weight.requires_grad)


def test_one_count_is_drawn_for_each_step() -> None:
    taught = projectors(method="m3_pool()", keep=[1, 4, 16], per_step="one", trained="projector")
    drawn = [[method.keep for method in taught.batch(step, part, 2, 1)[1]] for step in range(12) for part in range(2)]
    assert {len(counts) for counts in drawn} == {1}
    assert {counts[0] for counts in drawn} == {1, 4, 16}
    # All shares of a step are taught the same.
    assert drawn[::2] == drawn[1::2]
    assert len(taught(taught.batch(0, 0, 1, 1), 0.0).figures) == 1


class Spoken(WorldSource):
    """Questions of which the first ones come without their picture."""

    def __init__(self, mute: int) -> None:
        super().__init__(families=["color"])
        self.mute = mute

    def at(self, number: int) -> Conversation:
        found = super().at(number)
        return replace(found, images=()) if number < self.mute else found


def test_the_first_conversations_may_come_without_a_picture() -> None:
    taught = Projectors(*embedded(), Spoken(3), method="pool_adapter()", keep=16)
    assert len(taught.learned) == 1
    # A step without pictures teaches the module nothing, and is one.
    taught(taught.batch(0, 0, 1, 2), 0.0).total.backward()
    assert {float(weight.grad.abs().max()) for weight in taught.learned.parameters()} == {0.0}


def test_data_without_pictures_teach_no_module() -> None:
    with pytest.raises(ValueError, match=r"the data hold no pictures in their first 200 conversations"):
        Projectors(*embedded(), Spoken(1000), method="pool_adapter()", keep=16)


def test_what_is_exported_is_what_was_learned(tmp_path: Path) -> None:
    taught = projectors(method="mqt(queries=64)", keep=[4, 16], per_step="one")
    (module,) = taught.learned
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert not any(weight.requires_grad for weight in taught.model.parameters())
    settings = Settings(steps=2, batch=2, warmup=0, learning_rate=1e-2, checkpoint_every=5)
    train(taught, settings, tmp_path, progress=False)
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(before) - {"pos_embed"}
    (path,) = tmp_path.rglob("mqt.safetensors")
    model, _ = embedded()
    inputs = taught.batch(5, 0, 1, 1)[0].inputs
    with torch.no_grad():
        with mmfast.accelerate(model, [taught.methods[1]]):
            expected = model(**inputs, use_cache=False).logits
        with mmfast.accelerate(model, f"mqt(queries=64, keep=16, weights={str(path)!r})"):
            found = model(**inputs, use_cache=False).logits
        with mmfast.accelerate(model, "mqt(queries=64, keep=16)"):
            untrained = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.allclose(untrained, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"method": "m3_pool()", "keep": 4}, "has nothing to learn"),
        ({"method": "mqt()", "keep": 300}, "the module of 'mqt' is never used"),
        ({"method": "uhd_resampler()", "keep": [4, 16]}, "is another one for each count"),
        ({"method": "fastv()", "keep": 4}, "must name one method before the language model"),
        ({"method": "mqt() + fastv()", "keep": 4}, "must name one method before the language model"),
        ({"method": "mqt()", "keep": []}, "must name at least one count"),
        ({"method": "mqt()", "keep": 4, "per_step": "some"}, "per_step='some' must be 'all' or 'one'"),
        ({"method": "mqt()", "keep": 4, "model_rate": 0}, "model_rate=0 must be above 0"),
    ],
)
def test_what_cannot_be_taught_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        projectors(**options)


def test_the_recipe_can_be_built() -> None:
    taught = Recipe.read(RECIPE).build()
    assert isinstance(taught, Projectors)
    assert [method.keep for method in taught.methods] == [1, 4, 16, 64, 256]
    with pytest.raises(ValueError, match="must say method and keep"):
        Recipe.read(RECIPE, {"objective.kind": "projector"}).of(
            {"objective": {"kind": "projector"}, "settings": {"steps": 1, "batch": 1}}
        ).build()
