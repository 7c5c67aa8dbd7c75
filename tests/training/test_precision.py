"""Every recipe takes a step in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmfast.training.recipe import Recipe
from mmfast.training.trainer import train

pytest.importorskip("accelerate", reason="training needs accelerate (extra train)")

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
SMALL = {"settings.precision": "bf16", "settings.steps": 2, "settings.batch": 1, "settings.warmup": 0}
SMALL_KINDS: dict[str, dict[str, Any]] = {
    "draft_head": {"objective.prompts": 2, "objective.new_tokens": 6, "objective.held_out": 0},
    "voco": {"data.questions": 1, "objective.tokens": 2},
    "projector": {"objective.keep": [16, 64]},
}


@pytest.fixture(autouse=True)
def other_precision() -> Iterator[None]:
    """Let accelerate forget the precision of other tests: it has one for each process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_under_autocast(path: Path, tmp_path: Path) -> None:
    kind = Recipe.read(path).kind
    recipe = Recipe.read(path, SMALL | SMALL_KINDS.get(kind, {}))
    figures = train(recipe.build(), recipe.settings, tmp_path, progress=False)
    assert figures["step"] == 2
    assert math.isfinite(figures["loss"])
