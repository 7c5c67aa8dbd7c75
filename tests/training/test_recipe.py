"""Recipes and the command that follows them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mmfast
from mmfast.cli import main
from mmfast.training.recipe import Recipe
from mmfast.training.trainer import read_log

pytest.importorskip("accelerate", reason="training needs accelerate (extra train)")

RECIPE = """
[objective]
kind = "supervised"
plan = "uniform(keep=32)"
trained = "projector"

[data]
world = true
families = ["color"]

[settings]
steps = 3
batch = 2
learning_rate = 1e-4
warmup = 1
log_every = 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_the_command_trains_and_goes_on(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["train", str(recipe), "--out", str(out), "--stop-after", "1"]) == 0
    assert "broken off" in capsys.readouterr().out
    assert main(["train", str(recipe), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert [line["step"] for line in read_log(out)] == [1, 2, 3]
    # What comes out is an ordinary model.
    from mmfast.adapters import load_pretrained

    model, _ = load_pretrained(str(out))
    assert type(model) is type(mmfast.load_default()[0])


def test_the_first_process_alone_says_what_came_of_it(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.PartialState.is_main_process", False)
    for words in ([], ["--json"]):
        assert main(["train", str(recipe), "--out", str(tmp_path), "--stop-after", "1", *words]) == 0
        assert capsys.readouterr().out == ""


def test_another_recipe_does_not_go_on(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", str(recipe), "--out", str(tmp_path / "out"), "--stop-after", "1"]
    assert main(command) == 0
    assert main([*command, "--set", "objective.plan=uniform(keep=16)"]) == 2
    assert "objective.plan='uniform(keep=32)' (now 'uniform(keep=16)')" in capsys.readouterr().err
    assert main([*command, "--set", "data.families=['shape']"]) == 2
    assert "data.families=['color'] (now ['shape'])" in capsys.readouterr().err
    assert main(command) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("settings.step=3", "'step' is no field of [settings]"),
        ("settings.steps=none", "steps='none' must be an int"),
        ("objective.kind=voc", "'voc' is no kind of objective"),
        ("objective.plans=x", "'plans' is no field of [objective]"),
        ("steps=3", "'steps' names no field"),
        ("settings.steps", "must have the form SECTION.FIELD=VALUE"),
        ("data.file=none.jsonl", "none.jsonl is no file"),
        ("data.file=3", "file=3 must be a path"),
        ("model.path=3", "path=3 must be a text"),
        ("data.world=false", "[data] must say either file or world = true, not neither"),
        ("data.world=yes", "world='yes' must be true or false"),
        ("data.media=pictures", "media='pictures' is of no use for the world"),
        ("data.frames=0", "frames=0 must be an int of at least 1"),
        ("data.frames=two", "frames='two' must be an int of at least 1"),
        ("data.questions=1.5", "questions=1.5 must be an int of at least 1"),
        ("data.families=color", "families='color' must be a list of names"),
        ("settings.learning_rate=fast", "learning_rate='fast' must be a finite number of at least 0"),
        ("settings.final=true", "final=True must be a number between 0 and 1"),
        ("settings.adam_beta2=x", "adam_beta2='x' must be a number of at least 0 and below 1"),
    ],
)
def test_mistakes_are_one_line(recipe: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--out", str(recipe.parent / "out"), "--set", change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("voco", "kd_weight", "much"),
        ("voco", "temperature", True),
        ("voco", "tokens", "four"),
        ("voco", "tokens", 4.0),
        ("gates", "model_rate", "slow"),
        ("projector", "model_rate", "slow"),
    ],
)
def test_numbers_of_an_objective_are_checked_by_type(kind: str, field: str, value: Any) -> None:
    needed = {"gates": {"plan": "p_mod()"}, "projector": {"method": "m3_pool()", "keep": 16}}.get(kind, {})
    objective = {"kind": kind, **needed, field: value}
    with pytest.raises(ValueError, match=f"{field}={value!r} must be"):
        Recipe.of({"objective": objective, "settings": {"steps": 1, "batch": 1}}).build()


def test_a_file_takes_the_place_of_the_world(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to whoever names them: the recipe, or the folder in which the command is given."""
    said = [{"from": "human", "value": "is it red?"}, {"from": "gpt", "value": "no"}]
    here = tmp_path / "here"
    here.mkdir()
    (here / "said.jsonl").write_text(json.dumps({"conversations": said}) + "\n")
    monkeypatch.chdir(here)
    changed = Recipe.read(recipe, {"data.file": "said.jsonl", "data.frames": 2})
    assert changed.data == {"file": "said.jsonl", "frames": 2}
    assert changed.about["data.file"] == str((here / "said.jsonl").resolve())
    assert changed.source().at(0).turns == (("is it red?", "no"),)
    recipe.write_text(RECIPE.replace("world = true", 'file = "said.jsonl"').replace('families = ["color"]', ""))
    assert Recipe.read(recipe).data == {"file": str(tmp_path / "said.jsonl")}
    assert Recipe.read(recipe, {"data.world": True}).data == {"world": True}
    with pytest.raises(ValueError, match="either file or world = true, not both"):
        Recipe.read(recipe, {"data.world": True, "data.file": "said.jsonl"})
    with pytest.raises(ValueError, match=r"families=\['color'\] is of no use for a file"):
        Recipe.read(recipe, {"data.families": ["color"]})


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("steps = ")
    with pytest.raises(ValueError, match="is no TOML"):
        Recipe.read(tmp_path / "bad.toml")
    with pytest.raises(FileNotFoundError, match="is no file"):
        Recipe.read(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="must say batch"):
        Recipe.of({"settings": {"steps": 1}})


@pytest.mark.parametrize(
    ("objective", "kept"),
    [
        ({"kind": "supervised"}, False),
        ({"kind": "voco"}, False),
        ({"kind": "projector", "method": "m3_pool()", "keep": 16, "trained": "language"}, False),
        ({"kind": "gates", "plan": "p_mod()"}, True),
        ({"kind": "draft_head", "method": "medusa"}, True),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_a_model_that_learns_is_held_in_float32(objective: dict[str, Any], kept: bool, tmp_path: Path) -> None:
    model, processor = mmfast.load_default(dtype="bfloat16")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    processor.save_pretrained(tmp_path)
    settings = {"steps": 1, "batch": 1}
    built = Recipe.of({"model": {"path": str(tmp_path)}, "objective": objective, "settings": settings}).build()
    assert {weight.dtype for weight in built.model.parameters()} == {torch.bfloat16 if kept else torch.float32}
    assert {weight.dtype for weight in built.parameters() if weight.requires_grad} == {torch.float32}


@pytest.mark.slow
def test_two_processes_train_together(recipe: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "mmfast"]
    words = ["train", str(recipe), "--out", str(tmp_path / "two")]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished") == 1
    assert "broken off" not in done.stdout
    assert [line["step"] for line in read_log(tmp_path / "two")] == [1, 2, 3]
