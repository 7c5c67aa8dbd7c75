"""Accuracy of the embedded model against kept tokens, on rendered scenes it has never seen.

    python benchmarks/accuracy.py [--questions N] [--out FILE.json]

Exact match on held-out questions (six families in equal numbers). ``keep`` is what is left of the 256 visual
tokens: at the entrance of the language model for methods before it, in its last layer for PyramidDrop.
Randomness is averaged over three seeds. The embedded model was trained with dropped backgrounds and
supervised attention, so methods that read its attention look better here than on public models.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mmfast
from mmfast.adapters import prepare
from mmfast.eval.datasets.shapes import Record, Shapes, score

KEEPS = (0.5, 0.25, 0.1)
METHODS = {
    "divprune": ("divprune(keep={keep})",),
    "pyramiddrop": ("pyramiddrop(keep={keep})",),
    "random": tuple(f"random(keep={{keep}}, seed={seed})" for seed in range(3)),
    "uniform": ("uniform(keep={keep})",),
    "pool2d": ("pool2d(keep={keep})",),
    "fastv": ("fastv(layer=2, keep={keep})",),
}


@torch.inference_mode()
def accuracy(model: Any, processor: Any, records: list[Record], plan: str, batch: int) -> dict[str, Any]:
    """Answer every question under a plan.

    Returns:
        The share of exact matches, per family and over all, and the visual tokens per layer.
    """
    right: dict[str, list[float]] = defaultdict(list)
    averages = []
    with mmfast.accelerate(model, plan) as fast:
        for start in range(0, len(records), batch):
            part = records[start : start + batch]
            inputs = prepare(processor, [r.question for r in part], [r.image for r in part])
            output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
            answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for record, answer in zip(part, answers, strict=True):
                right[record.family].append(float(score(answer, record.answer)))
            averages.append(fast.report().layer_average / len(part))
    every = [value for values in right.values() for value in values]
    return {
        "plan": plan,
        "accuracy": sum(every) / len(every),
        "families": {family: sum(values) / len(values) for family, values in sorted(right.items())},
        "layer_average": sum(averages) / len(averages),
    }


def main() -> int:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=600, help="held-out questions (default 600)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    model, processor = mmfast.load_default()
    records = list(Shapes(split="heldout", num_questions=options.questions))
    full = accuracy(model, processor, records, "full", options.batch)
    cells = [(name, keep) for name in METHODS for keep in KEEPS]
    results: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    for name, keep in track(cells, description="plans", transient=True):
        runs = [accuracy(model, processor, records, plan.format(keep=keep), options.batch) for plan in METHODS[name]]
        results[name][str(keep)] = {
            "accuracy": sum(run["accuracy"] for run in runs) / len(runs),
            "layer_average": runs[0]["layer_average"],
            "families": {f: sum(run["families"][f] for run in runs) / len(runs) for f in runs[0]["families"]},
            "plans": [run["plan"] for run in runs],
        }
    error = 1.96 * math.sqrt(full["accuracy"] * (1 - full["accuracy"]) / len(records))
    console = Console(width=140)
    table = Table(
        title=f"Exact match on {len(records)} held-out questions (+-{error:.3f} at 95 %)",
        title_justify="left",
    )
    for column in ("kept", "full", *METHODS):
        table.add_column(column)
    table.add_row("100 %", f"{full['accuracy']:.3f}", *("" for _ in METHODS))
    for keep in KEEPS:
        table.add_row(f"{keep:.0%}", "", *(f"{results[name][str(keep)]['accuracy']:.3f}" for name in METHODS))
    console.print(table)
    console.print({family: round(value, 3) for family, value in full["families"].items()})
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "questions": len(records),
            "full": full,
            "methods": results,
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
                "mmfast": mmfast.__version__,
            },
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
