"""Train the embedded model from nothing: ``python -m mmfast.training.default_model.recipe --out FOLDER``.

Five stages, each resumable: patches that know what and where they show, a language model on symbols, a projector
between them, everything together on pixels, and early layers that look at what is asked about. The first two do not
depend on each other and may run side by side (``--only vision``, ``--only language``).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmfast.eval.datasets.shapes import WORLD_VERSION
from mmfast.training.default_model.stages import STUDENT, AlignStage, JointStage, LanguageStage, LookStage, VisionStage
from mmfast.training.default_model.student import Student
from mmfast.training.settings import Settings
from mmfast.training.trainer import read_log, train

LAYERS = 8


@dataclass(frozen=True)
class Part:
    """One stage of the recipe.

    Attributes:
        name: its folder.
        stage: its objective.
        settings: its numbers.
        after: the stages whose weights it starts from.
    """

    name: str
    stage: Callable[[Student, int, int], Any]
    settings: Settings
    after: tuple[str, ...]


def _muon(steps: int, batch: int, rate: float, other: float, seed: int = 0) -> Settings:
    return Settings(
        steps=steps,
        batch=batch,
        optimizer="muon",
        learning_rate=rate,
        other_rate=other,
        decay_from=0.4,
        schedule="linear",
        seed=seed,
        checkpoint_every=100,
    )


PARTS: tuple[Part, ...] = (
    Part("vision", VisionStage, _muon(2800, 8, 3e-3, 1.5e-3), ()),
    Part("language", LanguageStage, _muon(3000, 8, 3e-3, 1.5e-3), ()),
    Part("align", AlignStage, Settings(steps=1500, batch=8, learning_rate=3e-3), ("vision", "language")),
    Part("joint", JointStage, _muon(4000, 8, 1.2e-3, 6e-4), ("align",)),
    Part("look", LookStage, _muon(600, 8, 6e-4, 3e-4), ("joint",)),
)


def run(part: Part, out: Path, *, stop_after: int | None = None, progress: bool = True) -> None:
    """Train one stage, or what is left of it."""
    home = out / part.name
    if (home / STUDENT).is_file():
        return
    student = Student(LAYERS)
    for earlier in part.after:
        _take(student, out / earlier / STUDENT, only=None if len(part.after) == 1 else earlier)
    stage = part.stage(student, part.settings.seed, part.settings.steps)
    train(stage, part.settings, home, stop_after=stop_after, progress=progress)


def export(out: Path, folder: Path) -> None:
    """Write the finished model as ``from_pretrained`` reads it, with what it was made from."""
    student = Student(LAYERS)
    student.load(out / PARTS[-1].name / STUDENT)
    student.model.set_attn_implementation("sdpa")
    folder.mkdir(parents=True, exist_ok=True)
    for config in (student.model.config.text_config, student.model.config.vision_config):
        config.dtype = torch.float16
    student.model.half().save_pretrained(folder)
    student.processor.save_pretrained(folder)
    stages = {part.name: {**asdict(part.settings), "course": _course(out / part.name)} for part in PARTS}
    made = {
        "layers": LAYERS,
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "world": WORLD_VERSION,
        "versions": {"torch": torch.__version__, "transformers": version("transformers")},
        "stages": stages,
    }
    (folder / "TRAINING.json").write_text(json.dumps(made, indent=1) + "\n")


def _course(home: Path) -> list[list[float]]:
    """Return step and mean loss of each tenth of a stage's log."""
    log = read_log(home)
    size = max(1, math.ceil(len(log) / 10))
    parts = [log[start : start + size] for start in range(0, len(log), size)]
    return [[part[-1]["step"], round(sum(line["loss"] for line in part) / len(part), 4)] for part in parts]


def _take(student: Student, path: Path, *, only: str | None) -> None:
    """Load a student whole, or the part of it that one of two parallel stages has trained."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train the stage {path.parent.name!r} first")
    if only is None:
        student.load(path)
        return
    state = load_file(path)
    language = {name for name in state if name.startswith(("model.model.language_model", "symbols"))}
    chosen = language if only == "language" else set(state) - language
    student.load_state_dict({name: state[name] for name in chosen}, strict=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Train the stages in order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; it is resumed if it exists")
    parser.add_argument("--only", choices=[part.name for part in PARTS], help="this stage alone")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--export", type=Path, help="where the finished model goes; default: OUT/model")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for part in PARTS:
        if options.only in (None, part.name):
            run(part, options.out)
    if options.only in (None, PARTS[-1].name):
        export(options.out, options.export or options.out / "model")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
