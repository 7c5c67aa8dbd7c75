"""Fit methods to the embedded model: ``python -m mmfast.training.default_model.calibrations --out FOLDER``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import mmfast
from mmfast.adapters import prepare
from mmfast.training.conversations import WorldSource

PLANS = {"vtw": "vtw()", "shortv": "shortv()", "fitprune": "fitprune(keep=0.4)"}
"""File name -> plan that is fitted."""

PROMPTS = 24


def write_calibrations(folder: Path, prompts: int = PROMPTS) -> list[Path]:
    """Fit every plan on questions of the training split.

    Args:
        folder: where a TOML file per plan is written.
        prompts: how many questions.

    Returns:
        The files.
    """
    model, processor = mmfast.load_default()
    source = WorldSource()
    samples = [
        prepare(processor, [conversation.turns[0][0]], [list(conversation.images)])
        for conversation in (source.at(number) for number in range(prompts))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.toml" for name in PLANS]
    for path, plan in zip(paths, PLANS.values(), strict=True):
        mmfast.calibrate(model, plan, samples, path=path)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help=f"questions to fit on (default {PROMPTS})")
    options = parser.parse_args(argv)
    write_calibrations(options.out, options.prompts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
