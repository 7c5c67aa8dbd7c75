"""What training with dropped tokens saves, and what learned gates are worth. All on one CPU thread.

    python benchmarks/training.py time                 # seconds of a training step, with and without pyramiddrop
    python benchmarks/training.py curves --plan "pyramiddrop()"  # loss of a run; once more with --plan full
    python benchmarks/training.py untrained            # training-free methods and untrained gates
    python benchmarks/training.py gates --plan "p_mod(keep=0.5)" # the same gates, trained

``time`` trains a LLaVA of random weights (12 layers, 576 visual tokens) and alternates the steps of both. ``curves``
lets the embedded model go on learning the rendered world, equal data, batch and steps, with the plan and without;
``--forget`` lets its language model begin anew, which needs far more steps than a few hundred. ``untrained`` and
``gates`` ask the embedded model held-out questions, ``model`` trains it for a method without gates. Seconds are those
of the process, as other work may run beside it.

Results are merged into the file that ``--out`` names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accuracy import accuracy, claim, half_width
from speed import machine
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import mmfast
from mmfast.eval.datasets.shapes import Shapes
from mmfast.training.conversations import WorldSource
from mmfast.training.gates import Gates
from mmfast.training.settings import Settings
from mmfast.training.supervised import IGNORED, Supervised, Taught
from mmfast.training.trainer import read_log, train

SIDE, ANSWER, BATCH = 24, 16, 2
SMALL = "predictor_width=64, predictor_heads=4"
UNTRAINED = (
    "full",
    "fastv(keep=0.1, layer=0.25)",
    "uniform_in_llm(keep=0.1, layer=0.25)",
    *(f"random_in_llm(keep=0.1, layer=0.25, seed={seed})" for seed in range(3)),
    f"dynamic_llava(keep=0.1, layer=0.25, {SMALL})",
    # As many visual tokens per layer as p_mod(keep=0.5): a quarter of the layers reads all of them.
    "uniform_in_llm(keep=0.3333, layer=0.25)",
    *(f"random_in_llm(keep=0.3333, layer=0.25, seed={seed})" for seed in range(3)),
    "fastv(keep=0.3333, layer=0.25)",
    "p_mod(keep=0.5)",
    # As many as gamma_mod(keep=0.5), which leaves half of the layers whole.
    "uniform_in_llm(keep=0.6667, layer=0.25)",
    "random_in_llm(keep=0.6667, layer=0.25, seed=0)",
    "gamma_mod(keep=0.5)",
)


# ------------------------------------------------------------------------------ seconds of a step


def wide_model() -> LlavaForConditionalGeneration:
    """Build a model of random weights whose tower costs little."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            image_size=14 * SIDE, patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=12, num_attention_heads=8,
            num_key_value_heads=8,
        ),
        image_token_id=1023,
        vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def examples(step: int) -> Taught:
    """Draw prompts of 576 visual and 48 text tokens with answers of 16."""
    chance = torch.Generator().manual_seed(step)
    visual = SIDE * SIDE
    ids = torch.randint(3, 1000, (BATCH, visual + 48 + ANSWER), generator=chance)
    ids[:, 5 : 5 + visual] = 1023
    labels = ids.clone()
    labels[:, :-ANSWER] = IGNORED
    pixels = torch.randn(BATCH, 3, 14 * SIDE, 14 * SIDE, generator=chance)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return Taught(inputs, labels, ("random",) * BATCH)


def measure_steps(plan: str, repeats: int) -> dict[str, Any]:
    """Take steps with the plan and without in turn; the first of each warms up."""
    model = wide_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seconds: dict[str, list[float]] = {"none": [], plan: []}
    for step in range(repeats + 1):
        for name, own in seconds.items():
            objective = Supervised(model, None, WorldSource(), plan="" if name == "none" else name)
            batch = examples(step)
            began = time.process_time()
            optimizer.zero_grad()
            objective(batch, 0.0).total.backward()
            optimizer.step()
            own += [time.process_time() - began] if step else []
            if objective.fast is not None:
                objective.fast.remove()
    middles = {name: statistics.median(own) for name, own in seconds.items()}
    return {
        "setting": f"12 layers of width 256, {SIDE * SIDE} visual + {48 + ANSWER} text tokens, batch {BATCH}, float32, "
        "forward, backward and AdamW",
        "repeats": repeats,
        "cpu_seconds": {name: round(own, 3) for name, own in middles.items()},
        "spread": {name: [round(min(own), 3), round(max(own), 3)] for name, own in seconds.items()},
        "ratio": round(middles[plan] / middles["none"], 3),
    }


# ------------------------------------------------------------------------------ what is learned


def forget_language(model: Any) -> None:
    """Draw the weights of the language model anew."""
    torch.manual_seed(0)
    for module in model.get_decoder().modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif hasattr(module, "weight") and isinstance(module.weight, Tensor):
            nn.init.ones_(module.weight)


def learn(objective: Supervised, options: argparse.Namespace, name: str) -> tuple[dict[str, Any], Path]:
    """Train, and return what a row of the results says of it."""
    settings = Settings(
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.rate,
        warmup=options.steps // 10,
        seed=options.seed,
        checkpoint_every=options.steps,
        log_every=max(1, options.steps // 40),
    )
    folder = options.work / f"{name}-{options.steps}-{options.seed}"
    began = time.process_time()
    train(objective, settings, folder, resume=False, progress=False)
    row = {
        "steps": options.steps,
        "batch": options.batch,
        "learning_rate": options.rate,
        "seed": options.seed,
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    return row, folder


def run_curve(options: argparse.Namespace, known: dict[str, Any]) -> None:
    """Teach the language model the world under one plan."""
    model, processor = mmfast.load_default(dtype="float32")
    if options.forget:
        forget_language(model)
    plan = "" if options.plan == "full" else options.plan
    source = WorldSource(families=options.families, seed=options.seed)
    row, folder = learn(Supervised(model, processor, source, plan=plan, trained="language"), options, "curve")
    row["families"] = list(source.families)
    row["loss"] = [[line["step"], round(line["loss"], 4)] for line in read_log(folder)]
    records = list(Shapes(split="heldout", families=options.families, num_questions=options.questions))
    model.eval()
    row["accuracy"] = {
        own: round(accuracy(model, processor, records, own, 20)["accuracy"], 4) for own in ("full", "pyramiddrop()")
    }
    row["questions"] = len(records)
    known[f"{options.plan}, {'from nothing' if options.forget else 'going on'}"] = row


def asked(model: Any, processor: Any, plan: str, questions: int) -> dict[str, Any]:
    """Ask held-out questions under a plan; a refusal is recorded as such."""
    records = list(Shapes(split="heldout", num_questions=questions))
    try:
        found = accuracy(model, processor, records, plan, 20)
    except ValueError as error:
        return {"refused": str(error)}
    return {
        "accuracy": round(found["accuracy"], 4),
        "half_width": round(half_width(found["accuracy"], len(records)), 4),
        "families": found["families"],
        "layer_average": found["layer_average"],
        "questions": len(records),
    }


def run_untrained(options: argparse.Namespace, known: dict[str, Any]) -> None:
    """Ask under every plan that nothing was learned for."""
    model, processor = mmfast.load_default(dtype="float32")
    for plan in UNTRAINED:
        if plan not in known:
            known[plan] = asked(model, processor, plan, options.questions)


def run_gates(options: argparse.Namespace, known: dict[str, Any]) -> None:
    """Train gates, load what was exported into a fresh model, and ask."""
    model, processor = mmfast.load_default(dtype="float32")
    source = WorldSource(seed=options.seed)
    plan, trained = options.plan, options.trained
    kind = Gates if options.command == "gates" else Supervised
    shares = {"model_rate": options.model_rate} if kind is Gates else {}
    objective = kind(model, processor, source, plan=plan, trained=trained, **shares)
    names = list(objective.learned) if isinstance(objective, Gates) else []
    method = plan.split("(")[0]
    row, folder = learn(objective, options, f"{options.command}-{method}-{trained}")
    row["trained"] = trained
    if shares and trained != "plan":
        row |= shares
    row["loss"] = [[line["step"], round(line.get("answers", line["loss"]), 4)] for line in read_log(folder)]
    row["last"] = read_log(folder)[-1]
    if trained == "plan":
        model, processor = mmfast.load_default(dtype="float32")
    told = [plan[len(method) + 1 : -1], f"weights={str(folder / f'{method}.safetensors')!r}"]
    weighted = f"{method}({', '.join(part for part in told if part)})" if names else plan
    row |= asked(model.eval(), processor, weighted, options.questions)
    known[f"{plan}, trained={trained}"] = row


def main() -> None:
    """Run what was asked for and merge it into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/training.json"), help="results as JSON; merged")
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="where runs are kept")
    parser.add_argument("--questions", type=int, default=300, help="held-out questions (default 300)")
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("time")
    steps.add_argument("--plan", default="pyramiddrop()")
    steps.add_argument("--repeats", type=int, default=5)
    commands.add_parser("untrained")
    for name, plan, count, rate in (
        ("curves", "pyramiddrop()", 200, 3e-4),
        ("gates", "p_mod(keep=0.5)", 400, 1e-2),
        ("model", "uniform_in_llm(keep=0.3333, layer=0.25)", 400, 3e-4),
    ):
        own = commands.add_parser(name)
        own.add_argument("--plan", default=plan)
        own.add_argument("--steps", type=int, default=count)
        own.add_argument("--batch", type=int, default=8)
        own.add_argument("--rate", type=float, default=rate)
        own.add_argument("--seed", type=int, default=0)
        own.add_argument("--families", nargs="+", help="of curves; all of them if not given")
        own.add_argument("--forget", action="store_true", help="of curves: begin with a new language model")
        own.add_argument("--trained", default="language" if name == "model" else "plan")
        own.add_argument("--model-rate", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    content: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if options.command == "time":
        content["time"] = measure_steps(options.plan, options.repeats)
    else:
        claim(content, mmfast.load_default()[0], options.out, questions=options.questions)
        run = {"curves": run_curve, "untrained": run_untrained}.get(options.command, run_gates)
        name = "gates" if options.command in ("untrained", "model") else options.command
        run(options, content.setdefault(name, {}))
    # Others may have written meanwhile: what they found stays.
    latest = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for name, found in content.items():
        latest[name] = {**latest.get(name, {}), **found} if isinstance(found, dict) else found
    latest["machine"] = machine(torch.device("cpu"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(latest, indent=1) + "\n")


if __name__ == "__main__":
    main()
