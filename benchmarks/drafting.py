"""Drafting against plain decoding: what it costs where it cannot help, and what it gives where it can.

    python benchmarks/drafting.py [--parts speed,drafters] [--repeats N] [--out FILE.json]

**speed**: a LLaVA of random weights (12 layers of width 768), 576 + 64 prompt tokens. Times are processor seconds of
one thread per token after the first; a drafted run is paired with a plain run right beside it, and their tokens must
be equal. ``off``: the drafter never has anything to propose. ``random``: tokens are sampled at a temperature at which
no draft can be right. ``again``: the same question a second time, whose answer is found among the earlier ones.
``copy``: a logits processor makes the answer repeat the text of the prompt, on both sides.

**drafters**: every drafter on the embedded model, with held-out questions whose answers are continued to a fixed
length because its own have one to three tokens, and on one tiny model of random weights per family. Drafts are always
as long as the drafter's options say here, so that acceptance is seen; ``adaptive`` is the time with the length, and
whether to draft at all, chosen by what pays. Tokens per forward on random weights show that the path works; they say
nothing of other models.

Every finished row is written at once, and a broken-off run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accuracy import claim
from rich.console import Console
from rich.progress import track
from rich.table import Table
from speed import build, machine, middle, prompt
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import mmfast
from mmfast.eval.datasets.shapes import Shapes
from mmfast.registry import register
from mmfast.speculative.base import Draft, Drafter, EachRow, Request, RowSession, Session, Verified

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.cases import one
from support.families import FAMILIES

PARTS = ("speed", "drafters")
NEW_TOKENS = 128
CONTINUED = 40
QUESTIONS = 6
FAMILY_TOKENS = 48


class Nothing(RowSession):
    """Never propose anything."""

    def propose(self, root: int, budget: int) -> Draft:
        """Return an empty draft."""
        return Draft()

    def observe(self, verified: Verified) -> None:
        """Take no note."""


@register("silent", stage="decode")
@dataclass(frozen=True)
class Silent(Drafter):
    """Have nothing to propose."""

    @property
    def most(self) -> int:
        """Tokens it would propose at most."""
        return 10

    def start(self, request: Request) -> Session:
        """Begin a call of ``generate``."""
        return EachRow([Nothing() for _ in request.prompts])


class Marks:
    """A streamer that notes the processor time at which each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the prompt, then each token."""
        self.times.append(time.process_time())

    def end(self) -> None:
        """Do nothing."""


class Repeating(LogitsProcessor):
    """Make the answer repeat a passage."""

    def __init__(self, passage: list[int], start: int) -> None:
        self.passage, self.start = passage, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave one token."""
        token = self.passage[(input_ids.shape[1] - self.start) % len(self.passage)]
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0.0
        return forced


def per_token(
    model: Any, inputs: dict[str, Tensor], new_tokens: int, seed: int = 0, **options: Any
) -> tuple[float, Tensor]:
    """Generate; return the seconds per token after the first, and the tokens."""
    marks = Marks()
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=new_tokens, streamer=marks, **options)
    new = output[0, inputs["input_ids"].shape[1] :]
    return (time.process_time() - marks.times[1]) / max(1, len(new) - 1), new


def paired(
    plain: Any, drafted: Any, inputs: dict[str, Tensor], options: Callable[[], dict[str, Any]], repeats: int
) -> dict[str, Any]:
    """Run the plain and the drafted model in turn, after one warm-up of both."""
    pairs, equal = [], True
    for turn in range(repeats + 1):
        # Another seed each time, or a sampled answer would be found among the earlier ones.
        slow, expected = per_token(plain, inputs, NEW_TOKENS, seed=turn, **options())
        fast, found = per_token(drafted, inputs, NEW_TOKENS, seed=turn, **options())
        equal = equal and torch.equal(found, expected)
        if turn:
            pairs.append((slow, fast))
    return {
        "plain_ms": 1e3 * middle(slow for slow, _ in pairs),
        "drafted_ms": 1e3 * middle(fast for _, fast in pairs),
        "speedup": middle(slow / fast for slow, fast in pairs),
        "least": min(slow / fast for slow, fast in pairs),
        "equal": equal,
    }


def speed_rows(repeats: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Measure what drafting costs where it cannot help, and gives where it can."""
    plain = build(torch.device("cpu"))
    plain.generation_config.eos_token_id = None
    plain.generation_config.pad_token_id = 0
    inputs = prompt(plain)
    start = inputs["input_ids"].shape[1]
    passage = inputs["input_ids"][0, -60:-4].tolist()
    # Sampled at this temperature, hardly any two tokens of the answer follow each other twice.
    scattered = {"do_sample": True, "temperature": 100.0, "top_k": 0}
    cases: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "off": ("silent()", lambda: {"do_sample": False}),
        "random": ("prompt_lookup()", lambda: scattered),
        "random, suffix": ("suffix()", lambda: scattered),
        "random, token_recycling": ("token_recycling()", lambda: scattered),
        "again": ("prompt_lookup()", lambda: {"do_sample": False}),
        "again, suffix": ("suffix()", lambda: {"do_sample": False}),
        "copy": (
            "prompt_lookup()",
            lambda: {"do_sample": False, "logits_processor": LogitsProcessorList([Repeating(passage, start)])},
        ),
    }

    def measured(plan: str, options: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        with mmfast.accelerate(copy.deepcopy(plain), plan) as fast:
            row = paired(plain, fast.model, inputs, options, repeats)
            record = fast.report().drafting
        return {"plan": plan, **row, **totals([record])}

    for name, (plan, options) in cases.items():
        yield name, lambda plan=plan, options=options: measured(plan, options)


def totals(records: list[Any]) -> dict[str, Any]:
    """Put the records of several calls together."""
    rounds = sum(record.rounds for record in records)
    drafted = sum(record.drafted for record in records)
    accepted = sum(record.accepted for record in records)
    deepest = max((len(record.tried) for record in records), default=0)
    tried = [sum(record.tried[i] for record in records if i < len(record.tried)) for i in range(deepest)]
    hit = [sum(record.hit[i] for record in records if i < len(record.hit)) for i in range(deepest)]
    return {
        "tokens_per_forward": sum(record.emitted for record in records) / max(1, rounds),
        "mean_accepted": accepted / max(1, rounds),
        "acceptance_rate": accepted / max(1, drafted),
        "acceptance": [found / asked for found, asked in zip(hit, tried, strict=True)][:6],
    }


FREE = ("prompt_lookup", "copyspec", "suffix", "token_recycling", "lookahead", "swift", "pruned_self")
"""Drafters that need neither training nor a second model."""
TRAINED = ("medusa", "hydra", "msd", "flash", "vispec")


def run_all(
    model: Any, prompts: list[dict[str, Tensor]], new_tokens: int, **options: Any
) -> tuple[float, list[Tensor]]:
    """Generate for every prompt; return the seconds per token after the first ones, and all tokens."""
    seconds, tokens, found = 0.0, 0, []
    for inputs in prompts:
        each, new = per_token(model, inputs, new_tokens, **options)
        seconds += each * (len(new) - 1)
        tokens += len(new) - 1
        found.append(new)
    return seconds / max(1, tokens), found


def drafter_row(
    model: Any, prompts: list[dict[str, Tensor]], plan: str, second: Any, new_tokens: int, repeats: int, **options: Any
) -> dict[str, Any]:
    """Measure one drafter on one model: with drafts of full length, and with the length that pays."""
    name, _, own = plan.partition("(")
    always = f"{name}(adaptive_length=False{', ' if own != ')' else ''}{own}"
    row: dict[str, Any] = {"plan": plan, "equal": True}
    with mmfast.accelerate(copy.deepcopy(model), always, draft_model=second) as fast:
        records = []
        for inputs in prompts:
            per_token(fast.model, inputs, new_tokens, **options)
            records.append(fast.report().drafting)
    row |= totals(records)
    for key, written in (("speedup", always), ("adaptive_speedup", plan)):
        ratios = []
        for turn in range(repeats + 1):
            slow, expected = run_all(model, prompts, new_tokens, **options)
            # A drafter that starts anew each time: it would find these answers among the earlier ones.
            with mmfast.accelerate(copy.deepcopy(model), written, draft_model=second) as fast:
                quick, found = run_all(fast.model, prompts, new_tokens, **options)
            row["equal"] = row["equal"] and all(map(torch.equal, expected, found))
            if turn:
                ratios.append(slow / quick)
        row[key] = middle(ratios)
    return row


def embedded_rows(
    content: dict[str, Any], out: Path, repeats: int
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every drafter on the embedded model."""
    model, processor = mmfast.load_default()
    claim(content, model, out)
    records = list(Shapes(split="test", num_questions=QUESTIONS, seed=3))
    prompts = [
        dict(processor(text=f"<image>\n{record.question}", images=record.image, return_tensors="pt"))
        for record in records
    ]
    text = transformers.LlamaForCausalLM(model.config.text_config).eval()
    text.model.load_state_dict(model.get_decoder().state_dict())
    text.lm_head.load_state_dict(model.get_output_embeddings().state_dict())
    plans: dict[str, tuple[str, Any]] = {name: (f"{name}()", None) for name in (*FREE, *TRAINED)}
    plans["assistant"] = ("assistant(plan='divprune(keep=32)')", copy.deepcopy(model))
    plans["text_draft"] = ("text_draft()", text)
    for name, (plan, second) in plans.items():
        yield (
            f"embedded, continued: {name}",
            lambda plan=plan, second=second: drafter_row(
                model, prompts, plan, second, CONTINUED, repeats, do_sample=False, min_new_tokens=CONTINUED
            ),
        )
    for name in ("prompt_lookup", "suffix", "msd"):
        yield (
            f"embedded, ordinary: {name}",
            lambda name=name: drafter_row(model, prompts, f"{name}()", None, 16, repeats, do_sample=False),
        )


def family_rows(repeats: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Drafters that need nothing on one tiny model of random weights per family."""
    for family in FAMILIES.values():
        for name in FREE:
            yield (
                f"{family.name}: {name}",
                lambda family=family, name=name: drafter_row(
                    family.model(), [one(family).inputs], f"{name}()", None, FAMILY_TOKENS, repeats, do_sample=False
                ),
            )


def save(content: dict[str, Any], path: Path) -> None:
    """Write what has been measured so far."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def tables(content: dict[str, Any]) -> Iterator[Table]:
    """Lay out what was measured."""
    speed = Table(title="One drafter where it cannot help and where it can", title_justify="left")
    for column in ("case", "plan", "plain", "drafted", "speed", "least", "tokens/forward", "equal"):
        speed.add_column(column)
    for name, row in content.get("speed", {}).items():
        speed.add_row(
            name, row["plan"], f"{row['plain_ms']:.1f} ms", f"{row['drafted_ms']:.1f} ms", f"{row['speedup']:.3f}x",
            f"{row['least']:.3f}x", f"{row['tokens_per_forward']:.2f}", str(row["equal"]),
        )  # fmt: skip
    yield speed
    drafters = Table(title="Every drafter", title_justify="left")
    for column in ("model: drafter", "tokens/forward", "accepted", "by place", "speed", "adaptive", "equal"):
        drafters.add_column(column)
    for name, row in content.get("drafters", {}).items():
        drafters.add_row(
            name, f"{row['tokens_per_forward']:.2f}", f"{row['acceptance_rate']:.0%}",
            " ".join(f"{share:.2f}" for share in row["acceptance"]), f"{row['speedup']:.2f}x",
            f"{row['adaptive_speedup']:.2f}x", str(row["equal"]),
        )  # fmt: skip
    yield drafters


def main() -> int:
    """Measure, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="counted pairs of runs (default 5)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/drafting.json"), help="results as JSON; resumed if there"
    )
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {','.join(sorted(unknown))}: choose from {','.join(PARTS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    content: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content["machine"] = machine(torch.device("cpu"))
    rows: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    if "speed" in parts:
        rows += [("speed", name, run) for name, run in speed_rows(options.repeats)]
    if "drafters" in parts:
        repeats = max(3, options.repeats - 2)
        found = itertools.chain(embedded_rows(content, options.out, repeats), family_rows(repeats))
        rows += [("drafters", name, run) for name, run in found]
    for part, name, run in track(rows, description="drafting", console=Console(stderr=True)):
        done = content.setdefault(part, {})
        if name not in done:
            done[name] = run()
            save(content, options.out)
    console = Console(width=150)
    for table in tables(content):
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
