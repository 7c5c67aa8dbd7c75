"""Accuracy, memory and speed of the methods that act on cached keys and values.

    python benchmarks/cache.py [--parts accuracy,memory,speed] [--questions N] [--methods NAME ...] [--out FILE.json]

**accuracy**: the embedded model on held-out questions, at three budgets, packers at their bits. Its answers are
one to three tokens, and the first token is computed before anything is evicted or packed, so two figures are
taken from one prefill. ``accuracy`` is the answer to the question in the prompt (and ``agreement`` the share of
answers equal to the untouched model's). ``second_question`` is the answer to another question about the same
picture, asked on the compressed cache, every token of which reads that cache. The embedded model was never
trained on second turns: after an answer of its own it scores 0.49 over all families. So the second question
follows the first one directly, without its answer, and comes from the families that the untouched model still
answers there (color, shape, where). Methods that read a part of the cache in each decode step read all of it
when several tokens come at once; they, and spec_kv, which evicts after the first such token, get the second
question token by token. ``kv_share`` is taken when the prompt has been read. Adjusters run on top of snapkv.

**memory**: bytes at ``keep=0.2``, and of packers, after 12,544 visual tokens in bfloat16. ``held`` counts every
tensor that can be reached from the cache, books and all, found by walking through its objects; ``share`` is what
the report says.

**speed**: decode steps and compression after 12,544 visual tokens in float32, in processor seconds of one thread.
The time that compression takes is that of its own code; ``prefill_ratio`` also holds what reading attention costs.

Every finished cell is written at once, and a broken-off run goes on where it stopped. Options are smaller than the
defaults where these are made for longer prompts than the 266 tokens here.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accuracy import claim, half_width
from long_prompt import described, held_bytes, long_model, long_prompt
from rich.console import Console
from rich.progress import track
from rich.table import Table
from speed import cost, in_turn, machine, middle
from torch import Tensor

import mmfast
from mmfast.adapters import prepare
from mmfast.eval.datasets.shapes import Record, Shapes, score

PARTS = ("accuracy", "memory", "speed")
KEEPS = (0.5, 0.2, 0.1)
SECOND_FAMILIES = ("color", "shape", "where")
PREFILLS = 3
BASE = "snapkv(keep={keep}, window=8)"
OPTIONS = {
    "snapkv": "window=8",
    "spec_kv": "lookahead=1, window=8",
    "adakv": 'scorer="snapkv(window=8)"',
    "critical_kv": 'scorer="snapkv(window=8)"',
    "pyramidkv": 'scorer="snapkv(window=8)"',
    "mixkv": "window=8",
    "sparsemm": "window=8",
    "lagkv": "lag=32",
    "actqkv": "dense_layers=0, first=4, local=16, block_size=8, window=8",
    "double_sparsity": "dense_layers=0, group_factor=8",
    "lserve": "dense_layers=0, sinks=4, local=16, page_size=8, window=8",
    "quest": "dense_layers=0, page_size=8",
    "recycled_attention": "dense_layers=0, recent=8",
    "rekv": "dense_layers=0",
    "sentence_kv": "dense_layers=0, first=4, local=8, sentence=8, window=8",
    "shadowkv": "dense_layers=0, outlier_chunks=2, local_chunks=1",
    "squeezed_attention": "dense_layers=0, clusters=0.1, observation=8",
    "token_select": "dense_layers=0, first=4, local=16",
    "vasparse": "dense_layers=0",
}
"""Options beside ``keep`` for the short prompts of the accuracy part."""

PACKERS = {
    "calibquant": {"bits=1": "bits=1"},
    "fp8": {"8 bits": "residual=16"},
    "gear": {f"bits={b}": f"bits={b}, group=32, residual=32" for b in (4, 2)},
    "int8": {"8 bits": "residual=16"},
    "kivi": {f"bits={b}": f"bits={b}, residual=32" for b in (4, 2)},
    "kvquant": {f"bits={b}": f"bits={b}, residual=16" for b in (4, 2)},
    "mustafar": {f"sparsity={s}": f"sparsity={s}, residual=16" for s in (0.5, 0.7)},
    "think": {f"drop={d}": f"drop={d}, window=8" for d in (0.4, 0.6)},
    "vidkv": {f"bits={b}": f"bits={b}, group=64" for b in (2, 1.5)},
}
"""Settings of packers, label -> options, for the short prompts of the accuracy part."""

LONG_PACKERS = {"kivi": ("bits=2", "bits=4"), "kvquant": ("bits=2", "bits=4"), "gear": ("bits=2", "bits=4")}
"""Options of packers in the memory part; the others run with their defaults."""


def settings(info: mmfast.MethodInfo) -> dict[str, str]:
    """Write the plans of the accuracy part, by label."""
    if info.kind == "Packer":
        options = PACKERS.get(info.name, {"default": ""})
        return {label: f"{info.name}({text})" for label, text in options.items()}
    if info.kind == "Adjuster":
        return {f"keep={keep}": f"{BASE.format(keep=keep)} + {info.name}()" for keep in KEEPS}
    if "keep" not in info.options:
        return {"default": f"{info.name}()"}
    more = f", {OPTIONS[info.name]}" if info.name in OPTIONS else ""
    return {f"keep={keep}": f"{info.name}(keep={keep}{more})" for keep in KEEPS}


def in_steps(info: mmfast.MethodInfo) -> bool:
    """Say whether a method acts in decode steps so that a question has to come token by token to meet it."""
    return info.kind == "Retriever" or info.name == "spec_kv"


def long_settings(info: mmfast.MethodInfo) -> dict[str, str]:
    """Write the plans of the memory part, by label."""
    if info.kind == "Packer":
        return {text or "default": f"{info.name}({text})" for text in LONG_PACKERS.get(info.name, ("",))}
    if info.kind == "Adjuster":
        return {"keep=0.2": f"snapkv(keep=0.2) + {info.name}()"}
    if "keep" not in info.options:
        return {"default": f"{info.name}({'layer=1' if 'layer' in info.options else ''})"}
    # By default the first two layers are not retrieved from, which here are all.
    return {"keep=0.2": f"{info.name}(keep=0.2{', dense_layers=0' if info.kind == 'Retriever' else ''})"}


# -------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Batch:
    """Questions whose prompts, and whose second questions, are equally long.

    Attributes:
        records: what is asked first.
        seconds: what is asked next about the same pictures; empty where a picture has no other question.
        inputs: prompts with the first questions.
        turn: ``[B, q]`` tokens of the second questions; None where there are none.
    """

    records: list[Record]
    seconds: list[Record]
    inputs: dict[str, Tensor]
    turn: Tensor | None


def batches(processor: Any, records: list[Record], size: int) -> list[Batch]:
    """Pair each question with the next one about its picture, and put equally long pairs together."""
    scenes: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        scenes[record.question_id.rpartition("/")[0]].append(record)
    groups: dict[tuple[int, int], list[tuple[Record, Record | None, list[int]]]] = defaultdict(list)
    for scene in scenes.values():
        for place, record in enumerate(scene):
            later = [r for r in (*scene[place + 1 :], *scene[:place]) if r.family in SECOND_FAMILIES]
            turn = _turn(processor, later[0].question) if later else []
            words = len(_turn(processor, record.question))
            groups[words, len(turn)].append((record, later[0] if later else None, turn))
    found = []
    for group in groups.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            firsts = [first for first, _, _ in part]
            inputs = prepare(processor, [r.question for r in firsts], [r.image for r in firsts])
            seconds = [second for _, second, _ in part if second is not None]
            turn = torch.tensor([ids for _, _, ids in part]) if seconds else None
            found.append(Batch(firsts, seconds, dict(inputs), turn))
    return found


def _turn(processor: Any, question: str) -> list[int]:
    """Write a question as the chat template does, without the token that begins a text."""
    message = {"role": "user", "content": [{"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    text = text.removeprefix(processor.tokenizer.bos_token)
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@contextmanager
def counted_reads(info: mmfast.MethodInfo) -> Iterator[list[float]]:
    """Collect the share of the stored entries that each decode step reads in each layer."""
    shares: list[float] = []
    if info.kind != "Retriever":
        yield shares
        return
    choose = info.method.choose  # type: ignore[attr-defined]

    def counted(self: Any, step: Any) -> Tensor | None:
        picked: Tensor | None = choose(self, step)
        shares.append(1.0 if picked is None else float(picked.float().mean()))
        return picked

    with patch.object(info.method, "choose", counted):
        yield shares


@torch.inference_mode()
def answers(model: Any, processor: Any, made: list[Batch], plan: str, *, stepwise: bool) -> dict[str, Any]:
    """Answer both questions of every picture under a plan.

    Args:
        model: the model.
        processor: its processor.
        made: the questions.
        plan: the plan.
        stepwise: give the second question token by token.

    Returns:
        The answers to the first questions, whether each is right, whether the second ones are, and bytes.
    """
    said: list[str] = []
    right: dict[str, list[bool]] = {"first": [], "second": []}
    kv_bytes = 0
    with mmfast.accelerate(model, plan) as fast:
        for batch in made:
            output = model(**batch.inputs, use_cache=True, logits_to_keep=1)
            kv_bytes += fast.report().kv_bytes
            cache, ids = output.past_key_values, batch.inputs["input_ids"]
            other = copy.deepcopy(cache)
            first = output.logits[:, -1].argmax(dim=-1, keepdim=True)
            own = _said(processor, torch.cat([first, _continued(model, torch.cat([ids, first], 1), cache)], dim=1))
            said += own
            right["first"] += [score(text, r.answer) for text, r in zip(own, batch.records, strict=True)]
            if batch.turn is None:
                continue
            longer = torch.cat([ids, batch.turn], dim=1)
            for place in range(ids.shape[1], longer.shape[1] - 1) if stepwise else ():
                mask = torch.ones_like(longer[:, : place + 1])
                model(input_ids=longer[:, place : place + 1], attention_mask=mask, past_key_values=other)
            texts = _said(processor, _continued(model, longer, other))
            right["second"] += [score(text, r.answer) for text, r in zip(texts, batch.seconds, strict=True)]
    return {"said": said, "right": right, "kv_bytes": kv_bytes}


def _continued(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Generate after what the cache holds and the ids that follow it."""
    output: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=9,
        do_sample=False,
    )
    return output[:, ids.shape[1] :]


def _said(processor: Any, tokens: Tensor) -> list[str]:
    """Decode answers up to their ends."""
    end = processor.tokenizer.eos_token_id
    rows = [row[: row.index(end)] if end in row else row for row in tokens.tolist()]
    texts: list[str] = processor.batch_decode(rows, skip_special_tokens=True)
    return texts


def _share(values: list[bool]) -> dict[str, Any]:
    share = sum(values) / len(values)
    return {"share": share, "half_width": half_width(share, len(values)), "answers": len(values)}


def accuracy_part(content: dict[str, Any], listed: list[mmfast.MethodInfo], options: argparse.Namespace) -> None:
    """Measure every method at every setting."""
    model, processor = mmfast.load_default()
    records = list(Shapes(split="heldout", num_questions=options.questions))
    own = content.setdefault("accuracy", {"methods": {}})
    claim(own, model, options.out, questions=len(records))
    made = batches(processor, records, options.batch)
    full = answers(model, processor, made, "full", stepwise=False)
    own["full"] = {"accuracy": _share(full["right"]["first"]), "second_question": _share(full["right"]["second"])}
    for info in track(listed, description="accuracy", transient=True):
        cells = own["methods"].setdefault(info.name, {})
        for label, plan in settings(info).items():
            if label in cells and cells[label]["plan"] == plan and "refused" not in cells[label]:
                continue
            try:
                with counted_reads(info) as reads:
                    found = answers(model, processor, made, plan, stepwise=in_steps(info))
            except Exception as error:
                cells[label] = {"plan": plan, "refused": f"{type(error).__name__}: {error}"}
            else:
                same = [one == two for one, two in zip(found["said"], full["said"], strict=True)]
                cells[label] = {
                    "plan": plan,
                    "accuracy": _share(found["right"]["first"]),
                    "second_question": _share(found["right"]["second"]),
                    "agreement": sum(same) / len(same),
                    "kv_share": found["kv_bytes"] / full["kv_bytes"],
                    # What retrieves keeps the whole cache, and reads this much of it in a step.
                    **({"read_share": sum(reads) / len(reads)} if reads else {}),
                }
            save(content, options.out)


# -------------------------------------------------------------------- long prompts


@torch.inference_mode()
def memory_part(content: dict[str, Any], listed: list[mmfast.MethodInfo], options: argparse.Namespace) -> None:
    """Count the bytes that every method leaves of a long prompt."""
    model = long_model(torch.bfloat16, layers=2, width=512)
    inputs = long_prompt(model)
    own = content.setdefault("memory", {"methods": {}})
    own["setting"] = described(model)
    cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    full = held_bytes(cache)
    own["full_bytes"] = full
    for info in track(listed, description="memory", transient=True):
        cells = own["methods"].setdefault(info.name, {})
        for label, plan in long_settings(info).items():
            if label in cells and "refused" not in cells[label]:
                continue
            try:
                with mmfast.accelerate(model, plan) as fast:
                    cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
                    counted = fast.report().kv_bytes
            except Exception as error:
                cells[label] = {"plan": plan, "refused": f"{type(error).__name__}: {error}"}
            else:
                held = held_bytes(cache)
                cells[label] = {
                    "plan": plan, "bytes": counted, "share": counted / full, "held": held, "held_share": held / full,
                }  # fmt: skip
            save(content, options.out)


@torch.inference_mode()
def speed_part(content: dict[str, Any], options: argparse.Namespace) -> None:
    """Time decode steps on a full and on a compressed cache, and the compression."""
    model = long_model(torch.float32, layers=4, width=512)
    inputs = long_prompt(model)
    own = content.setdefault("speed", {"plans": {}})
    own.update(setting=described(model), repeats=options.repeats)
    plans = [f"{name}(keep={keep})" for name in ("snapkv", "knorm") for keep in KEEPS]
    for plan in track([plan for plan in plans if plan not in own["plans"]], description="speed", transient=True):
        with mmfast.accelerate(model, plan) as fast:
            own["plans"][plan] = _timed(model, inputs, fast, options.repeats)
        save(content, options.out)


def _timed(model: Any, inputs: dict[str, Tensor], fast: mmfast.Accelerated, repeats: int) -> dict[str, float]:
    """Time prefill and decode steps of a plan, in turn with the untouched model."""
    caches: dict[str, Any] = {}
    selecting: list[float] = []
    token = torch.full((1, 1), 5)

    def prefill(which: str) -> None:
        caches[which] = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values

    def step(which: str) -> None:
        model(input_ids=token, past_key_values=caches[which])

    def untouched(run: Callable[[str], None]) -> None:
        with fast.suspended():
            run("full")

    def compressed() -> None:
        prefill("small")
        selecting.append(fast.report().seconds["selection"])

    vision = min(cost(lambda: model.model.get_image_features(inputs["pixel_values"]), model.device) for _ in range(2))
    prefills = in_turn(lambda: untouched(prefill), compressed, PREFILLS, model.device)
    steps = in_turn(lambda: untouched(step), lambda: step("small"), repeats, model.device)
    whole = middle(full for full, _ in prefills) - vision
    time_saved = 1 - middle(small / full for full, small in steps)
    bytes_saved = 1 - held_bytes(caches["small"]) / held_bytes(caches["full"])
    return {
        "full_step_ms": 1e3 * middle(full for full, _ in steps),
        "step_ms": 1e3 * middle(small for _, small in steps),
        "time_saved": time_saved,
        "bytes_saved": bytes_saved,
        "time_per_bytes": time_saved / bytes_saved,
        "prefill_s": whole,
        "compression_share": middle(selecting[1:]) / whole,
        "prefill_ratio": middle((small - vision) / (full - vision) for full, small in prefills),
    }


# -------------------------------------------------------------------------- results


def save(content: dict[str, Any], out: Path) -> None:
    """Write what there is."""
    out.write_text(json.dumps(content, indent=1) + "\n")


def tables(content: dict[str, Any]) -> Iterator[Table]:
    """Show the results."""
    if "accuracy" in content:
        own = content["accuracy"]
        full = own["full"]
        table = Table(
            title=f"{own['questions']} held-out questions; untouched {full['accuracy']['share']:.3f}, second question "
            f"{full['second_question']['share']:.3f} +-{full['second_question']['half_width']:.3f}",
            title_justify="left",
        )
        _fill(table, own["methods"], ("accuracy", "second_question", "agreement", "kv_share", "read_share"))
        yield table
    if "memory" in content:
        table = Table(title=f"Bytes of a long prompt: {content['memory']['setting']}", title_justify="left")
        _fill(table, content["memory"]["methods"], ("share", "held_share"))
        yield table
    if "speed" in content:
        table = Table(title=f"Speed: {content['speed']['setting']}", title_justify="left")
        plans = content["speed"]["plans"]
        _fill(table, {plan: {"": cell} for plan, cell in plans.items()}, tuple(next(iter(plans.values()), ())))
        yield table


def _fill(table: Table, methods: dict[str, dict[str, Any]], columns: tuple[str, ...]) -> None:
    for column in ("method", "setting", *columns):
        table.add_column(column, overflow="fold")
    for name, cells in methods.items():
        for label, cell in cells.items():
            if "refused" in cell:
                table.add_row(name, label, f"refused: {cell['refused']}")
                continue
            values = (cell.get(column, "") for column in columns)
            plain = (value["share"] if isinstance(value, dict) else value for value in values)
            table.add_row(name, label, *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in plain))


def main() -> int:
    """Measure, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)} (default: all)")
    parser.add_argument("--questions", type=int, default=300, help="held-out questions (default 300)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9, help="counted decode steps of each (default 9)")
    parser.add_argument("--methods", nargs="*", help="only these, in the parts accuracy and memory")
    parser.add_argument("--out", type=Path, default=Path("build/cache.json"), help="results as JSON; resumed if there")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {','.join(sorted(unknown))}: choose from {','.join(PARTS)}")
    torch.set_num_threads(1)
    listed = [info for info in mmfast.methods("cache") if not options.methods or info.name in options.methods]
    content: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content["machine"] = machine(torch.device("cpu"))
    if "accuracy" in parts:
        accuracy_part(content, listed, options)
    if "memory" in parts:
        memory_part(content, listed, options)
    if "speed" in parts:
        speed_part(content, options)
    # What an earlier run measured stays, in the order of the registry.
    order = [info.name for info in mmfast.methods("cache")]
    for part in ("accuracy", "memory"):
        if part in content:
            cells = content[part]["methods"]
            content[part]["methods"] = {name: cells[name] for name in order if name in cells}
    content["kinds"] = {info.name: info.kind for info in mmfast.methods("cache")}
    save(content, options.out)
    console = Console(width=150)
    for table in tables(content):
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
