"""Train a model, or parts for one, by a recipe."""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path
from typing import Any

from mmfast.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("recipe", metavar="RECIPE.toml", help="what is trained, on what, and how")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where log, checkpoints and result go"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change the recipe")
    parser.add_argument("--fresh", action="store_true", help="begin anew instead of going on from a checkpoint")
    parser.add_argument("--stop-after", type=int, metavar="N", help="break off after N steps, with a checkpoint")


def run(options: argparse.Namespace) -> None:
    """Train, then say where the result is."""
    from mmfast.training.recipe import Recipe
    from mmfast.training.trainer import finite, train

    if options.stop_after is not None:
        common.check_numbers(options, "stop_after")
    recipe = Recipe.read(options.recipe, dict(_change(text) for text in options.set))
    common.quiet_libraries()
    with common.working("loading the model"):
        objective = recipe.build()
    figures = train(
        objective,
        recipe.settings,
        options.out,
        about=recipe.about,
        resume=not options.fresh,
        stop_after=options.stop_after,
        progress=sys.stderr.isatty(),
    )
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if options.json:
        common.write_json({"out": str(options.out), **{name: finite(value) for name, value in figures.items()}})
        return
    done = figures.get("step") == recipe.settings.steps
    state = "finished" if done else "broken off; the same command goes on"
    listed = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    sys.stdout.write(f"{options.out}: {state} ({listed})\n")


def _change(text: str) -> tuple[str, Any]:
    """Read ``settings.steps=10``; the value is TOML, or plain text where it is none."""
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"--set {text!r} must have the form SECTION.FIELD=VALUE")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value
