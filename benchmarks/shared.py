"""Speed of many questions about one long prompt.

    python benchmarks/shared.py [--repeats N] [--out FILE.json]

A prompt of 12,544 visual tokens is read once into a ``SharedContext``, which then answers 32 questions; against it,
the untouched model reads prompt and question anew for each. Separate runs all do the same work, so one question is
run ``--repeats`` times and its median taken times 32. Everything is in processor seconds of one thread, float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from long_prompt import described, long_model, long_prompt
from rich.console import Console
from rich.progress import track
from rich.table import Table
from speed import cost, machine, middle
from torch import Tensor

import mmfast

QUESTIONS, QUESTION_TOKENS, NEW_TOKENS = 32, 16, 32


@torch.inference_mode()
def measured(repeats: int) -> dict[str, Any]:
    """Measure both ways in turn."""
    model = long_model(torch.float32, layers=4, width=512)
    # Answers of random weights are to be equally long.
    model.generation_config.eos_token_id = None
    inputs = long_prompt(model)
    generator = torch.Generator().manual_seed(2)
    questions = torch.randint(3, 1000, (QUESTIONS, QUESTION_TOKENS), generator=generator)
    seconds: dict[str, list[float]] = {name: [] for name in ("prefill", "separate", "read", "answer")}
    answers: list[list[int]] = []
    alone: list[Tensor] = []
    contexts: list[mmfast.SharedContext] = []

    def whole(question: Tensor) -> dict[str, Tensor]:
        ids = torch.cat([inputs["input_ids"], question[None]], dim=1)
        return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def separate(question: Tensor) -> None:
        made = model.generate(**whole(question), max_new_tokens=NEW_TOKENS, do_sample=False)
        alone.append(made[0, -NEW_TOKENS:])

    def read() -> None:
        contexts[:] = [mmfast.SharedContext(model, inputs)]

    def answer() -> None:
        answers[:] = contexts[0].ask(questions.tolist(), max_new_tokens=NEW_TOKENS, eos_token_id=[])

    # The first round warms up and is not counted.
    for turn in track(range(repeats + 1), description="shared", transient=True):
        question = questions[turn % QUESTIONS]
        found = {
            "prefill": cost(lambda own=question: model(**whole(own), logits_to_keep=1), model.device),
            "separate": cost(lambda own=question: separate(own), model.device),
            "read": cost(read, model.device),
            "answer": cost(answer, model.device),
        }
        for name, value in found.items():
            seconds[name] += [value] if turn else []
    middles = {name: middle(values) for name, values in seconds.items()}
    return {
        "setting": described(model),
        "questions": QUESTIONS,
        "question_tokens": QUESTION_TOKENS,
        "new_tokens": NEW_TOKENS,
        "repeats": repeats,
        "seconds": middles,
        "speedup": QUESTIONS * middles["separate"] / (middles["read"] + middles["answer"]),
        "answer_speedup": QUESTIONS * (middles["separate"] - middles["prefill"]) / middles["answer"],
        "equal_answers": sum(own.tolist() == answers[turn] for turn, own in enumerate(alone)) / len(alone),
    }


def main() -> int:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of each (default 3)")
    parser.add_argument("--out", type=Path, default=Path("build/shared.json"), help="results as JSON")
    options = parser.parse_args()
    if not 1 <= options.repeats < QUESTIONS:
        parser.error(f"--repeats {options.repeats}: give 1 to {QUESTIONS - 1}")
    torch.set_num_threads(1)
    found = measured(options.repeats)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(torch.device("cpu")), "shared": found}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    table = Table("what", "value", title=f"{QUESTIONS} questions: {found['setting']}", title_justify="left")
    for name, value in {**found["seconds"], **found}.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.2f}")
    Console(width=150).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
