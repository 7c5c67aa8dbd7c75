"""Write the generated parts of the pages from the registries and the committed results; run by ``make tables``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tables import ROOT, latest, model_note, table
from training_tables import card_pictures, card_retention, trained_text

import mmfast
from mmfast.adapters import families
from mmfast.zoo import default_path

STAGES = {
    "frames": "which frames of a video are encoded at all",
    "before_llm": "which visual tokens enter the language model, or what they merge into",
    "in_llm": "which of them go on inside it, layer by layer",
    "cache": "what its cache keeps, and in how many bits",
    "decode": "drafts of several tokens, of which the model accepts what it would have said",
}
COLUMNS = (
    "method",
    "stage",
    "action",
    "needs",
    "positions",
    "later turns see",
    "training",
    "vectors",
    "works with",
    "paper",
    "code",
)


def _works_with(info: mmfast.MethodInfo) -> str:
    """Name the families that give the method what it asks for, or the fewer that do not."""
    every = families()
    served = [
        name
        for name, adapter in every.items()
        if set(info.needs) <= adapter.signals
        and not (info.stage == "in_llm" and adapter.no_layer_drops)
        and not (info.kind == "Compressor" and adapter.reads_both_ways)
        and (adapter.can_compact or not getattr(info.method, "compacts", False))
    ]
    missing = [name for name in every if name not in served]
    if not missing:
        return "all families"
    if len(missing) <= len(served):
        return f"all families but {', '.join(f'`{name}`' for name in missing)}"
    return ", ".join(f"`{name}`" for name in served)


def _paper_link(paper: str) -> str:
    number = paper.removeprefix("arXiv ")
    return f"[{number}](https://arxiv.org/abs/{number})" if number != paper else paper or "baseline"


def method_table() -> str:
    """Return the table as Markdown, one row per registered method."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    rows += [
        (
            f"`{info.name}`",
            info.stage,
            info.action,
            ", ".join(info.needs).replace("_", " "),
            info.positions,
            info.turns,
            "no" if info.training_free else "yes",
            "yes" if info.vectors else "",
            _works_with(info),
            _paper_link(info.paper),
            f"[{info.source}](https://github.com/{info.source})" if info.source else "",
        )
        for info in mmfast.methods()
    ]
    return table(rows)


def accuracy_text() -> str:
    """Describe accuracy against kept tokens."""
    result = latest("accuracy-*.json")
    depth = json.loads((default_path() / "config.json").read_text())["text_config"]["num_hidden_layers"]
    methods, signs = result["methods"], {"better": " +", "worse": " -", "same": ""}
    keeps = list(next(iter(methods.values())))
    rows: list[tuple[str, ...]] = [("method", *(f"keep={keep}" for keep in keeps))]
    for name, cells in methods.items():
        verdict = result["against_random"][name]
        rows.append(
            (
                f"`{name}`",
                *(
                    "refused"
                    if "refused" in own
                    else f"{own['accuracy']:.3f}{signs[verdict[keep]]} ({own['layer_average']:.0f})"
                    for keep, own in cells.items()
                ),
            )
        )
    families = ", ".join(f"{name} {value:.3f}" for name, value in result["full"]["families"].items())
    losers = "; ".join(
        f"keep={keep}: "
        + (", ".join(f"`{n}`" for n, v in result["against_random"].items() if v.get(keep) == "worse") or "none")
        for keep in keeps
    )
    return (
        f"**Accuracy of the demo model** on {result['questions']} held-out questions (exact match; random baselines: "
        f"mean of three seeds; {result['date']}), made by `python benchmarks/accuracy.py`. Untouched: "
        f"{result['full']['accuracy']:.3f} ({families}). In brackets the visual tokens a layer reads on average, of "
        "256. A plus or minus says better or worse than random dropping at the same stage and the same tokens per "
        f"layer, by more than the 95 % interval of the difference.{model_note(result)}\n\n"
        f"<details><summary>All methods at four budgets</summary>\n\n{table(rows)}\n\n</details>\n\n"
        "![Accuracy against visual tokens per layer, one panel per method](images/accuracy.svg)\n\n"
        f"Worse than random: {losers}. Methods that need training run without trained weights here, which says "
        f"nothing of them but that they run. The demo model has fewer layers ({depth}) than real ones, so "
        "methods inside it have less room, and it was trained with dropped backgrounds and with attention "
        "supervised up to its middle layer: methods that read attention look better here than on public models."
    )


def speed_text() -> str:
    """Describe speed against FLOPs."""
    result = latest("speed-*.json")
    rows: list[tuple[str, ...]] = [
        ("plan", "prefill, full", "prefill, plan", "faster", "language model alone", "FLOPs ratio", "selection")
    ]
    rows += [
        (
            f"`{row['plan']}`",
            f"{row['full_ms']:.0f} ms",
            f"{row['plan_ms']:.0f} ms",
            f"{row['speedup']:.2f}x",
            f"{row['llm_speedup']:.2f}x",
            f"{row['flops_ratio']:.2f}x",
            f"{row['selection_share_of_full_prefill']:.1%}",
        )
        for row in result["prefill"]
    ]
    overhead = "; ".join(f"{row['what']} {row['ratio'] - 1:+.1%}" for row in result["overhead"])
    machine = result["machine"]
    return (
        f"**Prefill** of a random-weight LLaVA ({result['setting']}; {machine['device']}, {machine['threads']} thread, "
        f"torch {machine['torch']}, transformers {machine['transformers']}, {machine['date']}; processor time, median "
        f"of {result['repeats']} runs in turn with the untouched model, vision and selection included), made by "
        f"`python benchmarks/speed.py`:\n\n{table(rows)}\n\nA plan that drops nothing costs: {overhead}. The last "
        "column is the share of the full prefill that choosing the tokens took."
    )


def cost_text() -> str:
    """Describe what each method costs and gains."""
    result = latest("methods-*.json")
    measured = [row for row in result["prefill"] if "speedup" in row]
    rows: list[tuple[str, ...]] = [("plan", "layer average", "choosing", "FLOPs ratio", "faster")]
    rows += [
        (
            f"`{row['plan']}`",
            f"{row['layer_average']:.0f}",
            f"{row['selection_share']:.1%}",
            f"{row['flops_ratio']:.2f}x",
            f"{row['speedup']:.2f}x" + (" **SLOWER**" if row["slower"] else ""),
        )
        for row in measured
    ]
    cheap = sum(row["selection_share"] < 0.05 for row in measured)
    slow = ", ".join(f"`{row['method']}`" for row in measured if row["slower"]) or "none"
    choices = [row for row in result["choices"] if "exponent" in row]
    quadratic = ", ".join(f"`{row['method']}`" for row in choices if row["exponent"] > 1.5) or "none"
    largest = max(choices, key=lambda row: row["mb_64"])
    machine = result["machine"]
    return (
        f"**Every method, 576 to 64 visual tokens**, against the untouched prefill ({result['setting']}; "
        f"{machine['device']}, {machine['threads']} thread, {machine['date']}; median of {result['repeats']}), made by "
        f"`python benchmarks/methods.py`. Choosing, reading the vision encoder included, takes less than 5 % of the "
        f"full prefill for {cheap} of {len(measured)} methods. Slower than no pruning here: {slow}.\n\n"
        f"<details><summary>Cost and gain of each</summary>\n\n{table(rows)}\n\n</details>\n\n"
        f"On 64 frames of 196 tokens the choice that takes most memory is `{largest['method']}` with "
        f"{largest['mb_64']:.0f} MB on top. Time grows with more than the power 1.5 of the tokens for: {quadratic}."
    )


def cache_text() -> str:
    """Describe what a compressed cache still answers, and what it holds."""
    result = latest("cache-*.json")
    own, memory = result["accuracy"], result["memory"]["methods"]
    rows: list[tuple[str, ...]] = [("plan", "first answer", "second question", "same answers", "bytes", "long bytes")]
    for name, cells in own["methods"].items():
        for label, cell in cells.items():
            long = memory.get(name, {}).get(label, {})
            rows.append(
                (
                    f"`{name}` {label}",
                    "refused" if "refused" in cell else f"{cell['accuracy']['share']:.3f}",
                    "" if "refused" in cell else f"{cell['second_question']['share']:.3f}",
                    "" if "refused" in cell else f"{cell['agreement']:.1%}",
                    "" if "refused" in cell else f"{cell['kv_share']:.1%}",
                    f"{long['share']:.1%}" if "share" in long else "",
                )
            )
    full = own["full"]
    return (
        f"**The cache of the demo model**, {own['questions']} held-out questions ({result['machine']['date']}), by "
        f"`python benchmarks/cache.py`. Untouched: first answer {full['accuracy']['share']:.3f}, second question about "
        f"the same picture {full['second_question']['share']:.3f}. The first answer begins before anything is evicted, "
        "so it says little; the second question is asked on what is left, which methods that read the first question "
        "chose for that one. Bytes are measured, as a share of the untouched cache (prompts of about 300 tokens), and "
        f"beside them those of a prompt of 12,544 visual tokens in bfloat16.{model_note(own)}\n\n"
        f"<details><summary>All methods of the cache</summary>\n\n{table(rows)}\n\n</details>\n\n"
        "![Exact match against bytes held, one panel per method](images/cache.svg)" + _cache_speed(result)
    )


def _cache_speed(result: dict[str, Any]) -> str:
    if "speed" not in result:
        return ""
    speed = result["speed"]
    rows: list[tuple[str, ...]] = [("plan", "decode step, full", "decode step, plan", "bytes saved", "choosing")]
    rows += [
        (
            f"`{plan}`",
            f"{row['full_step_ms']:.1f} ms",
            f"{row['step_ms']:.1f} ms" + (" **SLOWER**" if row["time_saved"] < 0 else ""),
            f"{row['bytes_saved']:.1%}",
            f"{row['compression_share']:.1%} of prefill",
        )
        for plan, row in speed["plans"].items()
    ]
    return f"\n\n**Decode steps on a long cache** ({speed['setting']}; median of {speed['repeats']}):\n\n{table(rows)}"


def shared_text() -> str:
    """Describe what sharing one prompt between many questions saves."""
    result = latest("shared-*.json")
    own, machine = result["shared"], result["machine"]
    seconds = own["seconds"]
    answered = own["questions"] * (seconds["separate"] - seconds["prefill"])
    return (
        f"**{own['questions']} questions about one long prompt** ({own['setting']}; {own['question_tokens']} tokens a "
        f"question, {own['new_tokens']} an answer; {machine['device']}, {machine['threads']} thread, torch "
        f"{machine['torch']}, transformers {machine['transformers']}, {machine['date']}; processor time, median of "
        f"{own['repeats']}), by `python benchmarks/shared.py`: `SharedContext` reads the prompt in "
        f"{seconds['read']:.1f} s and answers all questions in {seconds['answer']:.1f} s. The untouched model takes "
        f"{seconds['separate']:.1f} s for one question, prompt and all, so {own['questions']} separate runs (scaled "
        f"from {own['repeats']} measured ones) take **{own['speedup']:.1f}x** the time. Answering alone, without "
        f"reading the prompt, is {own['answer_speedup']:.1f}x faster ({answered:.0f} s against "
        f"{seconds['answer']:.1f} s). "
        f"{own['equal_answers']:.0%} of the answers compared were equal."
    )


def drafting_text() -> str:
    """Describe what drafting costs where it cannot help, and gives where it can."""
    result = latest("drafting-*.json")
    machine = result["machine"]
    cases: list[tuple[str, ...]] = [("case", "plan", "plain", "drafted", "faster", "least", "tokens per forward")]
    cases += [
        (
            name,
            f"`{row['plan']}`",
            f"{row['plain_ms']:.1f} ms",
            f"{row['drafted_ms']:.1f} ms",
            f"{row['speedup']:.2f}x",
            f"{row['least']:.2f}x",
            f"{row['tokens_per_forward']:.2f}",
        )
        for name, row in result["speed"].items()
    ]
    drafters: list[tuple[str, ...]] = [
        (
            "model: drafter",
            "tokens per forward",
            "without the model's own",
            "accepted",
            "by place",
            "always",
            "adaptive",
        )
    ]
    drafters += [
        (
            name,
            f"{row['tokens_per_forward']:.2f}",
            f"{row['mean_accepted']:.2f}",
            f"{row['acceptance_rate']:.0%}",
            " ".join(f"{share:.2f}" for share in row["acceptance"][:4]),
            f"{row['speedup']:.2f}x",
            f"{row['adaptive_speedup']:.2f}x",
        )
        for name, row in result["drafters"].items()
    ]
    rows = [*result["speed"].values(), *result["drafters"].values()]
    different = [name for name, row in (result["speed"] | result["drafters"]).items() if not row["equal"]]
    unpaid = sum(row["adaptive_speedup"] < 1.0 for row in result["drafters"].values())
    return (
        "**Drafting** against plain decoding, seconds per token after the first (LLaVA of random weights, 12 layers of "
        f"width 768, float32, sdpa attention, batch 1, 576 + 64 prompt tokens, 128 new tokens; {machine['device']}, "
        f"{machine['threads']} thread, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"{machine['date']}; processor time, median over pairs of runs), by `python benchmarks/drafting.py`. `off`: "
        "nothing to propose; `random`: tokens drawn at a temperature at which no draft can be right; `again`: the same "
        "question a second time; `copy`: the answer repeats the text of the prompt.\n\n"
        f"{table(cases)}\n\n"
        "Every drafter on the demo model, whose answers are continued to 40 tokens (`ordinary`: its own, of one to "
        "three), and those that need nothing on a tiny model of random weights per family, which repeats itself more "
        "than real ones do. `always` drafts as much as the options say, `adaptive` as much as pays: on models this "
        f"small the loop itself costs as much as a forward. {unpaid} of {len(result['drafters'])} did not pay there. "
        f"{'All' if not different else len(rows) - len(different)} of {len(rows)} gave the tokens of plain decoding"
        f"{'' if not different else '; not so: ' + ', '.join(different)}.{model_note(result)}\n\n"
        f"<details><summary>All drafters</summary>\n\n{table(drafters)}\n\n</details>"
    )


def bench_text() -> str:
    """Describe what the benchmark harness found on a CPU."""
    result = latest("bench-*.json")
    cells, machine, call = result["cells"], result["machine"], result["calls"][-1]
    models: list[tuple[str, ...]] = [
        ("model", "with", "first token", "per token", "first faster", "later faster", "in all", "of decode floor")
    ]
    operations: list[tuple[str, ...]] = [("operation", "batch", "torch", "baseline", "faster", "of copy", "of matmul")]
    for cell in cells.values():
        sides = cell.get("sides", {})
        if "model" in cell and cell["contender"] in sides:
            models.append(_bench_model(cell, sides[cell["contender"]]))
        elif "torch" in sides and cell["baseline"] in sides:
            operations.append(_bench_operation(cell, sides["torch"], sides[cell["baseline"]]))
    repeats = max(
        row["seconds"]["repeats"] for cell in cells.values() for row in cell["sides"].values() if "bytes" in cell
    )
    return (
        f"**Operations and models against what the machine can do** ({machine['device']}, {machine['threads']} thread, "
        f"torch {machine['torch']}, transformers {machine['transformers']}, {call['began'][:10]}; processor seconds, "
        f"medians of up to {repeats} rounds in turn, {call['dtype']}; shapes shrunken for a CPU), made by "
        "`mmfast bench --scale small --repeats 3 --new-tokens 16`, a part of its cells. A copy moves "
        f"{call['ceilings']['copy'] / 1e9:.1f} GB/s and a product of matrices does "
        f"{call['ceilings']['matmul'] / 1e12:.3f} TFLOP/s here. Models of random weights, 6 layers of width 512, batch "
        "1, against the untouched model with sdpa attention; the floor of decoding reads weights and cache once.\n\n"
        f"{table(models)}\n\n"
        "<details><summary>The torch form of every operation, against what one would write first</summary>\n\n"
        f"{table(operations)}\n\n</details>\n\n"
        "Nothing has been measured on a GPU yet; [its goals](../benchmarks/results/gpu/README.md) are written down."
    )


def _bench_model(cell: dict[str, Any], row: dict[str, Any]) -> tuple[str, ...]:
    faster = [row[f"faster_{what}"]["median"] for what in ("first_token", "per_token", "total")]
    return (
        f"{cell['model']} shape, {cell['visual_tokens']} visual tokens",
        f"`{cell['contender']}`",
        f"{1e3 * row['first_token']['median']:.0f} ms",
        f"{1e3 * row['per_token']['median']:.1f} ms",
        *(f"{value:.2f}x" for value in faster[:2]),
        f"{faster[2]:.2f}x" + (" **SLOWER**" if row["slower"] else ""),
        f"{row['share_of_decode_floor']:.0%}",
    )


def _bench_operation(cell: dict[str, Any], row: dict[str, Any], base: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"`{cell['operation']}`, {cell['size']['label']}",
        str(cell["size"]["batch"]),
        f"{1e3 * row['seconds']['median']:.2f} ms",
        f"{cell['baseline']} {1e3 * base['seconds']['median']:.2f} ms",
        f"{row['faster']['median']:.2f}x" + (" **SLOWER**" if row["slower"] else ""),
        f"{row['share_of_copy']:.0%}",
        f"{row['share_of_matmul']:.0%}",
    )


def filled(page: str, name: str, content: str) -> str:
    """Return the page with ``content`` between the markers called ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def catalogue() -> str:
    """Return the names of all methods, a row per stage."""
    rows: list[tuple[str, ...]] = [("stage", "what it does", "methods")]
    for stage, what in STAGES.items():
        rows.append((stage, what, ", ".join(f"`{info.name}`" for info in mmfast.methods(stage))))
    names = ", ".join(f"`{name}`" for name in families())
    return f"{table(rows)}\n\nFamilies, by `config.model_type`: {names}."


def measured() -> str:
    """Return everything that was measured."""
    parts = (speed_text(), cost_text(), accuracy_text(), cache_text(), shared_text(), drafting_text(), bench_text())
    return "\n\n".join(parts)


GENERATED: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"catalogue": catalogue, "speed": speed_text},
    "docs/methods.md": {"methods": method_table},
    "docs/measured.md": {"measured": measured},
    "docs/training.md": {"trained": trained_text},
    "mmfast/data/tinyvlm/MODEL_CARD.md": {"pictures": card_pictures, "retention": card_retention},
}
"""Page -> name of a generated part -> what writes it."""


def updated(name: str) -> str:
    """Return a page with its generated parts renewed."""
    page = (ROOT / name).read_text()
    for part, write in GENERATED[name].items():
        page = filled(page, part, write())
    return page


if __name__ == "__main__":
    for name in GENERATED:
        (ROOT / name).write_text(updated(name))
