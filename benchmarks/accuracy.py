"""Accuracy of the embedded model against kept tokens, for every method, on rendered scenes it has never seen.

    python benchmarks/accuracy.py [--questions N] [--methods NAME ...] [--out FILE.json]

Exact match on held-out questions (six families in equal numbers), ``keep`` as each method means it: what is
left before the language model or after a single drop, the average over the layers for schedules. The visual
tokens that a layer really read on average are recorded beside it. Randomness is averaged over three seeds.
Every finished cell is written at once, and a broken-off run goes on where it stopped. The embedded model was
trained with dropped backgrounds and supervised attention, so methods that read its attention look better here
than on public models.
"""

from __future__ import annotations

import argparse
import itertools
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
from mmfast.eval.runner import fingerprint

KEEPS = (0.5, 0.25, 0.1, 0.05)
SEEDED = {
    "random": "random(keep={keep}, seed={seed})",
    # After a quarter of the layers, so that the baseline spans what schedules come to.
    "random_in_llm": "random_in_llm(keep={keep}, layer=0.25, seed={seed})",
}
SEEDS = 3


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


def plans(info: mmfast.MethodInfo, keep: float) -> list[str]:
    """Write the plans whose results are averaged."""
    if "keep" not in info.options:
        return [f"{info.name}()"]
    if info.name in SEEDED:
        return [SEEDED[info.name].format(keep=keep, seed=seed) for seed in range(SEEDS)]
    return [f"{info.name}(keep={keep})"]


def cell(model: Any, processor: Any, records: list[Record], info: mmfast.MethodInfo, keep: float, batch: int) -> Any:
    """Measure one method at one budget; a refusal is recorded as such."""
    try:
        runs = [accuracy(model, processor, records, plan, batch) for plan in plans(info, keep)]
    except ValueError as error:
        return {"refused": str(error)}
    return {
        "accuracy": sum(run["accuracy"] for run in runs) / len(runs),
        "answers": len(records) * len(runs),
        "layer_average": runs[0]["layer_average"],
        "families": {f: sum(run["families"][f] for run in runs) / len(runs) for f in runs[0]["families"]},
        "plans": [run["plan"] for run in runs],
    }


def claim(content: dict[str, Any], model: Any, path: Path, **told: int) -> None:
    """Write into results which weights they are of, and what else must not change.

    Raises:
        SystemExit: if they are of others, for both would stand in one table.
    """
    for name, value in {"weights": fingerprint(model), **told}.items():
        if content.setdefault(name, value) != value:
            raise SystemExit(f"{path} holds results of {name} {content[name]}, not {value}; pass another --out")


def half_width(share: float, answers: int) -> float:
    """Return half the width of the 95 % confidence interval of a share (Wilson).

    Unlike the normal approximation it is not zero where every answer is right.
    """
    z = 1.96
    return z / (1 + z * z / answers) * math.sqrt(share * (1 - share) / answers + z * z / (4 * answers * answers))


def verdicts(results: dict[str, Any], stages: dict[str, str]) -> dict[str, dict[str, str]]:
    """Say of each cell whether it is better or worse than random dropping at the same tokens per layer.

    Random dropping at the same stage is interpolated to the tokens per layer of the cell; a difference
    counts when it exceeds its own 95 % interval.
    """
    found: dict[str, dict[str, str]] = {}
    for name, cells in results.items():
        baseline = results["random" if stages[name] == "before_llm" else "random_in_llm"]
        points = sorted((c["layer_average"], c["accuracy"], c["answers"]) for c in baseline.values())
        found[name] = {}
        for keep, own in cells.items():
            if "refused" in own:
                continue
            chance = _interpolated(points, own["layer_average"])
            width = math.hypot(half_width(own["accuracy"], own["answers"]), half_width(chance, points[0][2]))
            difference = own["accuracy"] - chance
            found[name][keep] = "same" if abs(difference) <= width else "better" if difference > 0 else "worse"
    return found


def _interpolated(points: list[tuple[float, float, int]], tokens: float) -> float:
    """Interpolate accuracy over the logarithm of the tokens; beyond the ends the nearest point holds."""
    if tokens <= points[0][0]:
        return points[0][1]
    for (left, low, _), (right, high, _) in itertools.pairwise(points):
        if tokens <= right:
            share = math.log(tokens / left) / math.log(right / left)
            return low + share * (high - low)
    return points[-1][1]


def _table(content: dict[str, Any]) -> Table:
    full = content["full"]
    width = half_width(full["accuracy"], content["questions"])
    table = Table(
        title=f"Exact match on {content['questions']} held-out questions; untouched {full['accuracy']:.3f} "
        f"(+-{width:.3f} at 95 %); + better, - worse than random at the same tokens per layer",
        title_justify="left",
    )
    for column in ("method", *(f"{keep:.0%}" for keep in KEEPS)):
        table.add_column(column)
    signs = {"better": "+", "worse": "-", "same": " "}
    for name, cells in content["methods"].items():
        row = [name]
        for keep in KEEPS:
            own = cells[str(keep)]
            row.append(
                "refused"
                if "refused" in own
                else f"{own['accuracy']:.3f}{signs[content['against_random'][name][str(keep)]]} "
                f"({own['layer_average']:.0f})"
            )
        table.add_row(*row)
    return table


def main() -> int:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=600, help="held-out questions (default 600)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--methods", nargs="*", help="only these (and the random baselines)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/accuracy.json"), help="results as JSON; resumed if there"
    )
    options = parser.parse_args()
    model, processor = mmfast.load_default()
    records = list(Shapes(split="heldout", num_questions=options.questions))
    listed = [
        info
        for info in mmfast.methods()
        if info.stage in ("before_llm", "in_llm")
        and info.kind != "Compressor"
        and (not options.methods or info.name in SEEDED or info.name in options.methods)
    ]
    content: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"methods": {}}
    claim(content, model, options.out, questions=len(records))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if "full" not in content:
        content["full"] = accuracy(model, processor, records, "full", options.batch)
    todo = [(info, keep) for info in listed for keep in KEEPS]
    for info, keep in track(todo, description="plans", transient=True):
        cells = content["methods"].setdefault(info.name, {})
        if str(keep) not in cells:
            cells[str(keep)] = cell(model, processor, records, info, keep, options.batch)
            options.out.write_text(json.dumps(content, indent=1) + "\n")
    # What an earlier run measured stays, in the order of the registry.
    content["stages"] = {info.name: info.stage for info in mmfast.methods() if info.name in content["methods"]}
    content["methods"] = {name: content["methods"][name] for name in content["stages"]}
    content["against_random"] = verdicts(content["methods"], content["stages"])
    content["versions"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "mmfast": mmfast.__version__,
    }
    content["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    console = Console(width=140)
    console.print(_table(content))
    worse = {keep: [n for n, v in content["against_random"].items() if v.get(str(keep)) == "worse"] for keep in KEEPS}
    for keep, names in worse.items():
        console.print(f"worse than random at keep={keep}: {', '.join(names) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
