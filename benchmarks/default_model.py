"""What the embedded model knows, by kind of question, and what it loses when tokens are dropped.

    python benchmarks/default_model.py [--questions N] [--model FOLDER] [--out FILE.json]

Exact match on held-out pictures and clips of the rendered world. Retention drops before the language model:
``random`` is the mean of three seeds, ``oracle`` keeps the patches of the objects asked about and fills up at random.
Finished parts are kept, and a broken-off run goes on after them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accuracy import claim, half_width
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import mmfast
from mmfast.adapters import load_pretrained, prepare
from mmfast.eval.datasets.shapes import CLIP_FAMILIES, CORE_FAMILIES, FAMILIES, MOTION_FAMILIES, Record, Shapes, score
from mmfast.registry import register
from mmfast.token_pruning.base import Selector
from mmfast.token_pruning.before_llm.random import random_subset
from mmfast.tokens import VisualTokens

FRAMES = (2, 4, 6, 8)
KEEPS = (0.5, 0.25, 0.1, 0.05)
SEEDS = 3
ANSWER = 40
"""Tokens a caption may take; all other answers are a few."""


@register("oracle", stage="before_llm")
@dataclass(frozen=True)
class Oracle(Selector):
    """Keep the patches of the objects that a question is about, then random ones."""

    objects: tuple[int, ...] = ()
    owners: tuple[int, ...] = ()

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Return the patches of the objects first."""
        order = random_subset(len(tokens), len(tokens), tokens.index)
        asked = torch.isin(torch.tensor(self.owners), torch.tensor(self.objects or (-2,)))
        first = torch.argsort((~asked[order]).int(), stable=True)
        return order[first][:kept].to(tokens.features.device)


@torch.inference_mode()
def right(model: Any, processor: Any, records: Sequence[Record], plan: str, batch: int) -> dict[str, list[float]]:
    """Say of each question whether it is answered rightly under a plan, by family."""
    found: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(records), batch):
        part = records[start : start + batch]
        clip = len(part[0].frames) > 1
        shown = [r.image for r in part] if not clip else None
        clips = [list(r.frames) for r in part] if clip else None
        inputs = prepare(processor, [r.question for r in part], shown, clips)
        with mmfast.accelerate(model, _at_work(plan, part)):
            output = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for record, answer in zip(part, answers, strict=True):
            found[record.family].append(float(score(answer, record.answer)))
    return found


def _at_work(plan: str, part: Sequence[Record]) -> Any:
    """Read a plan; the oracle knows the one record it is shown."""
    if not plan.startswith("oracle"):
        return plan
    (record,) = part
    owners = tuple(int(v) for v in np.asarray(record.owners).reshape(-1))
    return [Oracle(keep=float(plan.split()[1]), objects=record.object_ids, owners=owners)]


def shares(found: dict[str, list[float]]) -> dict[str, Any]:
    """Return the share of right answers by family and over all."""
    every = [value for values in found.values() for value in values]
    return {
        "families": {family: round(sum(values) / len(values), 4) for family, values in found.items()},
        "mean": round(sum(every) / len(every), 4),
        "questions": len(every),
    }


def parts(model: Any, processor: Any, each: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name everything that is measured."""

    def pictures(families: Sequence[str], plans: Sequence[str], batch: int = 25) -> dict[str, Any]:
        records = list(Shapes(split="heldout", families=families, num_questions=each * len(families)))
        runs = [shares(right(model, processor, records, plan, batch)) for plan in plans]
        mean = {f: round(sum(r["families"][f] for r in runs) / len(runs), 4) for f in runs[0]["families"]}
        return runs[0] | {"families": mean, "mean": round(sum(r["mean"] for r in runs) / len(runs), 4)}

    def clips(frames: int) -> dict[str, Any]:
        families = (*CLIP_FAMILIES, *MOTION_FAMILIES)
        half = max(1, each // 2)
        records = list(
            Shapes(split="heldout", families=families, num_questions=half * len(families), num_frames=frames)
        )
        return shares(right(model, processor, records, "full", 10))

    found: dict[str, Callable[[], dict[str, Any]]] = {"pictures": lambda: pictures(FAMILIES, ["full"])}
    found |= {f"clips of {n} frames": lambda n=n: clips(n) for n in FRAMES}
    for keep in KEEPS:
        seeds = [f"random(keep={keep}, seed={seed})" for seed in range(SEEDS)]
        found[f"random {keep}"] = lambda seeds=seeds: pictures(CORE_FAMILIES, seeds)
        for name in ("uniform", "divprune", "fastv"):
            plan = f"{name}(keep={keep})"
            found[f"{name} {keep}"] = lambda plan=plan: pictures(CORE_FAMILIES, [plan])
        found[f"oracle {keep}"] = lambda keep=keep: pictures(CORE_FAMILIES, [f"oracle {keep}"], batch=1)
    return found


def main() -> int:
    """Measure, write and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100, help="per family of pictures; half for clips")
    parser.add_argument("--model", type=Path, help="a folder; default: the embedded model")
    parser.add_argument("--only", nargs="*", help="parts whose names begin so")
    parser.add_argument("--out", type=Path, default=Path("build/default_model.json"), help="merged if it is there")
    options = parser.parse_args()
    if options.model is None:
        model, processor = mmfast.load_default()
    else:
        model, processor = load_pretrained(options.model, dtype="float32", progress=False)
    content: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    measured = content.setdefault("measured", {})
    claim(content, model, options.out, each=options.questions)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    todo = parts(model, processor, options.questions)
    chosen = [n for n in todo if n not in measured and (not options.only or n.startswith(tuple(options.only)))]
    for name in track(chosen, description="parts", transient=True):
        measured[name] = todo[name]()
        content["versions"] = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "mmfast": mmfast.__version__,
        }
        content["parameters"] = sum(p.numel() for p in model.parameters())
        content["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    table = Table(title="Exact match, +- half of the 95 % interval")
    for column in ("part", "mean", "families"):
        table.add_column(column)
    for name, row in measured.items():
        width = half_width(row["mean"], row["questions"])
        by_family = ", ".join(f"{family} {value:.2f}" for family, value in row["families"].items())
        table.add_row(name, f"{row['mean']:.3f}+-{width:.3f}", by_family)
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
