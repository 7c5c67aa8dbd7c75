"""Can one small model read its images at 1, 4, 16, 64 or all 256 tokens? A short fine-tuning, on one CPU thread.

    python benchmarks/compressors.py m3 --steps 40
    python benchmarks/compressors.py full --steps 40
    python benchmarks/compressors.py mqt --steps 60

``pool2d``: the embedded model as it is, its tokens averaged to each count. ``m3``: the same model after some steps of
``recipes/matryoshka.toml``, the loss being the mean over all counts. ``full``: after as many steps with all tokens, so
that what is gained by training at all can be told from what is gained by training at every count. ``mqt``: learned
queries in the place of the projector, from nothing, with the number drawn for each step.

Exact match on questions of the rendered world that were in no training. Each variant is merged into the file that
``--out`` names. The steps are far fewer than any paper's; the file says how many, and what they cost.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accuracy import claim

import mmfast
from mmfast.adapters import prepare
from mmfast.eval.datasets.shapes import Record, Shapes, score
from mmfast.training.conversations import WorldSource
from mmfast.training.projectors import Projectors
from mmfast.training.settings import Settings
from mmfast.training.trainer import train

COUNTS = (1, 4, 16, 64, 256)

# Method, counts it is trained at, how many of them in a step, what of the model learns, peak learning rate, and the
# model's share of it.
VARIANTS: dict[str, dict[str, Any]] = {
    "m3": {"method": "m3_pool()", "keep": COUNTS, "per_step": "all", "trained": "language+projector", "rate": 3e-4},
    "full": {"method": "m3_pool()", "keep": (256,), "per_step": "all", "trained": "language+projector", "rate": 3e-4},
    "mqt": {
        "method": "mqt(queries=256)",
        "keep": (1, 4, 16, 64, 128),
        "per_step": "one",
        "trained": "language",
        "rate": 2e-3,
        "model_rate": 0.15,
    },
}


@torch.inference_mode()
def accuracy(model: Any, processor: Any, records: list[Record], method: Any, batch: int = 32) -> dict[str, Any]:
    """Answer every question with a method at work."""
    right = []
    with mmfast.accelerate(model, [method]):
        for start in range(0, len(records), batch):
            part = records[start : start + batch]
            inputs = prepare(processor, [r.question for r in part], [r.image for r in part])
            output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += [float(score(answer, record.answer)) for record, answer in zip(part, answers, strict=True)]
    share = sum(right) / len(right)
    return {"accuracy": round(share, 4), "half_width": round(1.96 * math.sqrt(share * (1 - share) / len(right)), 4)}


def learn(name: str, model: Any, processor: Any, steps: int, seed: int) -> tuple[Projectors, dict[str, Any]]:
    """Train a variant; return what was trained and what it cost."""
    chosen = dict(VARIANTS[name])
    rate = chosen.pop("rate")
    objective = Projectors(model, processor, WorldSource(seed=seed + 1), **chosen)
    settings = Settings(
        steps=steps, batch=8, learning_rate=rate, warmup=steps // 10, final=0.0, checkpoint_every=steps + 1, seed=seed
    )
    wall, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train(objective, settings, folder, progress=False)
    cost = {"seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(time.process_time() - used, 1)}
    told = {**{key: list(v) if isinstance(v, tuple) else v for key, v in chosen.items()}, "learning_rate": rate}
    weights = sum(weight.numel() for weight in objective.parameters() if weight.requires_grad)
    return objective, {**told, "steps": steps, "batch": 8, "seed": seed, "trained_parameters": weights, **cost}


def methods_of(name: str, objective: Projectors | None) -> dict[int, Any]:
    """Return the method to test with at each count."""
    if name == "mqt" and objective is not None:
        return {method.keep: method for method in objective.methods}
    kind = "m3_pool" if name == "m3" else "pool2d"
    return {count: mmfast.Plan.parse(f"{kind}(keep={count})").methods[0] for count in COUNTS}


def main() -> None:
    """Run one variant and merge it into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=["pool2d", *VARIANTS])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("build/compressors.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = mmfast.load_default(dtype="float32")
    content: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    claim(content, model, options.out)
    objective, row = None, {}
    if options.variant != "pool2d":
        objective, row["training"] = learn(options.variant, model, processor, options.steps, options.seed)
    model.eval()
    records = list(Shapes(split="heldout", num_questions=options.questions))
    row["questions"] = len(records)
    row["counts"] = {
        str(count): accuracy(model, processor, records, method)
        for count, method in methods_of(options.variant, objective).items()
    }
    content["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    content["machine"] = f"{platform.machine()}, one thread beside other work"
    content.setdefault("variants", {})[options.variant] = row
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
