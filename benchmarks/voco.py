"""Do compression tokens learn to carry an image? Two small proofs, made from nothing on one CPU thread.

    python benchmarks/voco.py task --task count --seeds 0
    python benchmarks/voco.py world --loss ce

``task``: a tiny LLaVA with random weights, pictures of 16 or 25 patches that each show one of some symbols, and
questions that only the patches can answer: how often is a symbol there (``count``), which one is at a place
(``look_up``). First it learns with the compression tokens in the prompt and nothing hidden: that is the upper bound,
and the same weights with the image hidden are the lower one. From there it goes on with the image hidden (voco), with
the image pooled and with a random choice of its tokens, equally many steps each.

``world``: the embedded model on questions about the rendered world. It is taught compression tokens, or with
``--method pool2d`` to read what that method leaves of an image, at as many steps and counts; ``bounds`` measures it as
it is.

Results are merged into the file that ``--out`` names.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accuracy import claim
from torch import Tensor, nn
from torch.nn import functional

import mmfast
from mmfast.adapters import CompressionTokens, add_compression_tokens, load_pretrained, prepare
from mmfast.eval import Shapes
from mmfast.training.compression import Compression
from mmfast.training.conversations import WorldSource
from mmfast.training.objective import Loss, Objective
from mmfast.training.projectors import Projectors
from mmfast.training.settings import Settings
from mmfast.training.supervised import Supervised
from mmfast.training.trainer import train

BOS, NEWLINE, VOCO, IMAGE = 1, 2, 3, 4
SYMBOLS, NUMBERS = 10, 30
VOCABULARY = 64
HELD_OUT = 1024
COUNTS = (1, 2, 4, 8)


# ------------------------------------------------------------------------------ the small task


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: ``"count"`` or ``"look_up"``.
        side: the picture has side x side patches.
        symbols: how many different ones there are.
    """

    name: str
    side: int
    symbols: int

    def draw(self, generator: np.random.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw symbols ``[B, N]``, question tokens ``[B]`` and answer tokens ``[B]``."""
        shown = generator.integers(self.symbols, size=(size, self.side**2))
        if self.name == "count":
            asked = generator.integers(self.symbols, size=size)
            # Two or three of the symbols are rare in each picture, so that counts differ.
            shown = np.where(generator.random(shown.shape) < generator.random((size, 1)), asked[:, None], shown)
            answer = NUMBERS + (shown == asked[:, None]).sum(axis=1)
            question = SYMBOLS + asked
        else:
            place = generator.integers(self.side**2, size=size)
            question, answer = NUMBERS + place, SYMBOLS + shown[np.arange(size), place]
        return torch.from_numpy(shown), torch.from_numpy(question), torch.from_numpy(answer)


TASKS = {"count": Task("count", 4, 4), "look_up": Task("look_up", 5, 8)}


class Answering(Objective):
    """A tiny LLaVA that answers questions about patches.

    Args:
        task: the questions.
        model: the model.
        counts: compression tokens behind the image; one of these is drawn for each step.
        seed: of the data.
    """

    def __init__(self, task: Task, model: nn.Module, counts: Sequence[int], seed: int) -> None:
        super().__init__()
        self.task, self.model, self.counts, self.seed = task, model, tuple(counts), seed
        look = torch.randn(task.symbols, 3, 2, 2, generator=torch.Generator().manual_seed(5))
        self.register_buffer("look", look, persistent=False)

    def batch(self, step: int, part: int, parts: int, size: int) -> dict[str, Tensor]:
        """Draw the questions of a step."""
        generator = np.random.default_rng([self.seed, step, part])
        count = int(np.random.default_rng([self.seed, step]).choice(self.counts))
        return self.examples(generator, size, count)

    def examples(self, generator: np.random.Generator, size: int, count: int) -> dict[str, Tensor]:
        """Draw questions with ``count`` compression tokens in the prompt."""
        shown, question, answer = self.task.draw(generator, size)
        side = self.task.side
        patches = self.look[shown].view(size, side, side, 3, 2, 2)
        pixels = patches.permute(0, 3, 1, 4, 2, 5).reshape(size, 3, 2 * side, 2 * side)
        prefix = torch.tensor([BOS, *[IMAGE] * side**2, NEWLINE, *[VOCO] * count, NEWLINE])
        ids = torch.cat([prefix.expand(size, -1), question[:, None]], dim=1)
        return {"input_ids": ids, "pixel_values": pixels, "answer": answer}

    def forward(self, batch: dict[str, Tensor], done: float) -> Loss:
        """Compute the loss of the answers."""
        logits = self.logits(batch)
        return Loss(functional.cross_entropy(logits, batch["answer"]))

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits ``[B, V]`` of the answers."""
        inputs = {name: value for name, value in batch.items() if name != "answer"}
        mask = torch.ones_like(inputs["input_ids"])
        output: Tensor = self.model(**inputs, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]
        return output

    @torch.no_grad()
    def accuracy(self, count: int, *, shuffled: bool = False) -> float:
        """Return the share of held-out questions answered rightly; ``shuffled`` shows each the picture of another."""
        batch = self.examples(np.random.default_rng([self.seed, 10**6]), HELD_OUT, count)
        if shuffled:
            batch["pixel_values"] = batch["pixel_values"].roll(1, dims=0)
        self.eval()
        right = (self.logits(batch).argmax(dim=-1) == batch["answer"]).float().mean()
        return round(float(right), 4)

    def export(self, folder: Path) -> None:
        """Keep nothing: the model goes on in memory."""


def tiny(task: Task, seed: int) -> nn.Module:
    """Build a LLaVA of three layers and width 64 whose vision encoder is one layer."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            **sizes,
            "num_hidden_layers": 1,
            "image_size": 2 * task.side,
            "patch_size": 2,
        },
        text_config={
            "model_type": "llama",
            **sizes,
            "num_hidden_layers": 3,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": False,
            "max_position_embeddings": 128,
        },
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.config.voco = asdict(CompressionTokens("<voco>", VOCO, max(COUNTS), "all"))
    return model


def learn(objective: Objective, steps: int, rate: float, batch: int = 64) -> float:
    """Train and return the seconds."""
    began = time.perf_counter()
    settings = Settings(
        steps=steps, batch=batch, learning_rate=rate, warmup=steps // 10, final=0.0, checkpoint_every=steps + 1
    )
    with tempfile.TemporaryDirectory() as folder:
        train(objective, settings, folder, progress=False)
    return round(time.perf_counter() - began, 1)


def upper_bound(options: argparse.Namespace, known: dict[str, Any]) -> nn.Module:
    """Return the model that learned with nothing hidden: from the working folder, or made now and kept there."""
    task, seed = TASKS[options.task], options.seed
    folder = options.work / f"{options.task}-{seed}-{options.steps}"
    if (folder / "config.json").is_file():
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
        plain = Answering(task, model, options.counts, seed)
    else:
        model = tiny(task, seed)
        plain = Answering(task, model, options.counts, seed)
        known.setdefault("seconds", {})["upper"] = learn(plain, options.steps, options.rate)
        model.save_pretrained(folder)
    known["upper"] = {str(n): plain.accuracy(n) for n in options.counts}
    with mmfast.accelerate(model, "voco()"):
        known["lower"] = {str(n): plain.accuracy(n) for n in options.counts}
    return model


def run_task(options: argparse.Namespace, known: dict[str, Any]) -> None:
    """Run one task with one seed, and add to what is known of it."""
    task, seed = TASKS[options.task], options.seed
    model, after = upper_bound(options, known), options.steps_after or options.steps
    known |= {
        "steps": [options.steps, after],
        "batch": 64,
        "learning_rate": options.rate,
        "parameters": sum(p.numel() for p in model.parameters()),
        "counts_drawn": list(options.counts),
    }
    for name in options.methods:
        hides = name.startswith("voco")
        rows: dict[str, dict[str, float]] = {"accuracy": {}, "shuffled": {}}
        for counts in [list(options.counts)] if hides else [[n] for n in options.baseline_counts]:
            student = copy.deepcopy(model)
            plans = {"voco": "voco()", "voco_visual": 'voco(hide_prefix="visual")'}
            going_on = Answering(task, student, counts, seed + 1)
            with mmfast.accelerate(student, plans.get(name, f"{name}(keep={counts[0]})")):
                known.setdefault("seconds", {})[f"{name} {counts}"] = learn(going_on, after, options.rate)
                for count in counts:
                    rows["accuracy"][str(count)] = going_on.accuracy(count)
                    rows["shuffled"][str(count)] = going_on.accuracy(count, shuffled=True)
            if name == "voco_visual":
                with mmfast.accelerate(student, 'voco(hide_prefix="all")'):
                    rows["tested_under_all"] = {str(n): going_on.accuracy(n) for n in counts}
        if hides:
            rows["retention"] = {
                n: round((value - known["lower"][n]) / max(known["upper"][n] - known["lower"][n], 1e-9), 3)
                for n, value in rows["accuracy"].items()
            }
        known[name] = rows


# ------------------------------------------------------------------------------ the embedded model


def world_accuracy(model: nn.Module, processor: Any, plan: str, records: Sequence[Any], **asked: Any) -> float:
    """Return the share of questions answered rightly under a plan; ``shuffled`` shows each the picture of another."""
    shuffled = asked.pop("shuffled", False)
    right = 0
    with mmfast.accelerate(model, plan):
        for start in range(0, len(records), 20):
            part = records[start : start + 20]
            # Neighbours may be questions about one picture.
            shift = len(part) // 2 if shuffled else 0
            pictures = [list(record.frames) for record in (*part[shift:], *part[:shift])]
            inputs = prepare(processor, [record.question for record in part], pictures, **asked)
            made = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            answers = processor.batch_decode(made, skip_special_tokens=True)
            right += sum(answer.strip() == record.answer for answer, record in zip(answers, part, strict=True))
    return round(right / len(records), 4)


def run_bounds(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the embedded model as it is: with its image cut down, and with compression tokens it never learned."""
    records = list(Shapes(split="heldout", families=options.families, num_questions=options.questions))
    model, processor = mmfast.load_default(dtype="float32")
    found: dict[str, Any] = {"questions": len(records), "families": options.families, "untrained": {}}
    for plan in ("full", *(f"{name}(keep={count})" for name in ("pool2d", "random") for count in options.tokens)):
        found["untrained"][plan] = world_accuracy(model, processor, plan, records)
    # What another picture is worth: some answers are right by chance.
    found["full_shuffled"] = world_accuracy(model, processor, "full", records, shuffled=True)
    add_compression_tokens(model, processor)
    for name, plan in (("upper", "full"), ("lower", "voco()")):
        found[name] = {
            str(n): world_accuracy(model, processor, plan, records, num_compressed=n) for n in options.tokens
        }
    return found


def run_world(options: argparse.Namespace) -> dict[str, Any]:
    """Train the embedded model in one way and measure what was exported, loaded anew."""
    records = list(Shapes(split="heldout", families=options.families, num_questions=options.questions))
    model, processor = mmfast.load_default(dtype="float32")
    source = WorldSource(families=options.families, seed=options.seed, questions=options.turns)
    objective: Supervised
    drawn = options.tokens if options.method else [*options.tokens, *[max(options.tokens)] * options.largest_again]
    if options.method:
        taught = {"keep": options.tokens, "per_step": "one", "trained": "language+projector"}
        objective = Projectors(model, processor, source, method=f"{options.method}()", **taught)
        name = options.method
    else:
        distinct, parts = not options.copies, options.part_weight
        objective = Compression(
            model,
            processor,
            source,
            tokens=drawn,
            distinct=distinct,
            loss=options.loss,
            part_weight=parts,
        )
        name = f"voco {options.loss}{' distinct' * distinct}{' parts' * (parts > 0)}"
    settings = Settings(
        steps=options.steps,
        batch=8,
        optimizer="muon",
        learning_rate=options.rate,
        decay_from=0.4,
        schedule="linear",
        seed=options.seed,
        checkpoint_every=100,
    )
    folder = options.work / f"world-{name.replace(' ', '-')}-{options.steps}-{options.seed}"
    began = time.process_time()
    # A run of the same name that saw other data, or other counts, must not be taken for this one.
    about = {"turns": options.turns, "tokens": drawn, "families": options.families}
    figures = train(objective, settings, folder, about=about, progress=False, stop_after=options.stop_after)
    row: dict[str, Any] = {"steps": options.steps, "batch": 8, "learning_rate": options.rate, "seed": options.seed}
    row |= {"optimizer": "muon", "counts_drawn": drawn, "questions_per_picture": options.turns}
    row |= {"cpu_seconds": round(time.process_time() - began, 1), "last_loss": round(figures["loss"], 4)}
    if figures["step"] < options.steps:
        row["broken_off_after"] = figures["step"]
        objective.eval()
        if objective.fast is not None:
            objective.fast.remove()
    else:
        model, processor = load_pretrained(folder, progress=False)
    if options.method:
        row["accuracy"] = {
            str(n): world_accuracy(model, processor, f"{options.method}(keep={n})", records) for n in options.tokens
        }
    else:
        row["accuracy"] = {
            str(n): world_accuracy(model, processor, "voco()", records, num_compressed=n) for n in options.tokens
        }
        row["shuffled"] = world_accuracy(model, processor, "voco()", records, shuffled=True)
    return {"trained": {f"{name}, {options.steps} steps, seed {options.seed}": row}}


def merged(known: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Put new results beside those that are known."""
    for name, value in new.items():
        known[name] = merged(known.get(name, {}), value) if isinstance(value, dict) else value
    return known


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def main() -> None:
    """Run what was asked for and merge it into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/voco.json"), help="results as JSON; merged if there")
    parser.add_argument("--work", type=Path, default=Path("build/voco"), help="where models in the making are kept")
    commands = parser.add_subparsers(dest="command", required=True)
    small = commands.add_parser("task")
    small.add_argument("--task", choices=list(TASKS), default="count")
    small.add_argument("--seed", type=int, default=0)
    small.add_argument("--steps", type=int, default=1000, help="of each phase (default 1000)")
    small.add_argument("--steps-after", type=int, help="of the phases with something hidden (default: as many)")
    small.add_argument("--rate", type=float, default=2e-3)
    small.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    small.add_argument("--baseline-counts", type=int, nargs="+", default=[4])
    small.add_argument("--methods", nargs="*", default=["voco", "pool2d", "random"])
    bounds = commands.add_parser("bounds")
    world = commands.add_parser("world")
    for one in (bounds, world):
        one.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="one is drawn for each step")
        one.add_argument("--families", nargs="+", default=["color", "shape"])
        one.add_argument("--questions", type=int, default=200)
    world.add_argument("--loss", choices=["ce", "ce+kd"], default="ce")
    world.add_argument("--copies", action="store_true", help="copies of one token instead of distinct ones")
    world.add_argument("--part-weight", type=float, default=0.15, help="see Compression; 0 asks for no parts")
    world.add_argument("--largest-again", type=int, default=3, help="draw the largest count so much more often")
    world.add_argument("--method", help="teach this method before the language model instead, such as pool2d")
    world.add_argument("--turns", type=int, default=8, help="questions about each picture at most, in turn")
    world.add_argument("--steps", type=int, default=1500)
    world.add_argument("--stop-after", type=int, help="break off after so many steps of this call, and measure")
    world.add_argument("--rate", type=float, default=1.2e-3)
    world.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any]
    if options.command == "task":
        seed = f"seed {options.seed}"
        known = _read(options.out).get("task", {}).get(options.task, {}).get(seed, {})
        run_task(options, known)
        found = {"task": {options.task: {seed: known}}}
    else:
        claim(_read(options.out), mmfast.load_default()[0], options.out)
        found = {"world": run_bounds(options) if options.command == "bounds" else run_world(options)}
        claim(found, mmfast.load_default()[0], options.out)
    found["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    found["machine"] = f"{platform.machine()}, one thread beside other work"
    content = merged(_read(options.out), found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
