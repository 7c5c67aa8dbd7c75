"""Write the README's tables from the registries and from the committed results; run by ``make readme``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mmfast
from mmfast.adapters import families

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("method", "stage", "needs training", "works with", "paper", "source")


def _works_with(info: mmfast.MethodInfo) -> str:
    """Name the families that give the method what it asks for, or the fewer that do not."""
    every = families()
    served = [
        name
        for name, adapter in every.items()
        if set(info.needs) <= adapter.signals and not (info.stage == "in_llm" and adapter.no_layer_drops)
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
            "no" if info.training_free else "yes",
            _works_with(info),
            _paper_link(info.paper),
            f"[{info.source}](https://github.com/{info.source})" if info.source else "",
        )
        for info in mmfast.methods()
    ]
    names = ", ".join(f"`{name}`" for name in families())
    return f"{table(rows)}\n\nFamilies, by `config.model_type`: {names}."


def table(rows: list[tuple[str, ...]]) -> str:
    """Return rows as a Markdown table; the first is the header."""
    lines = [rows[0], tuple("---" for _ in rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def latest(pattern: str) -> dict[str, Any]:
    """Read the newest committed result file (their names end in a date)."""
    content: dict[str, Any] = json.loads(sorted(RESULTS.glob(pattern))[-1].read_text())
    return content


def accuracy_text() -> str:
    """Describe accuracy against kept tokens."""
    result = latest("accuracy-*.json")
    methods = result["methods"]
    rows = [("kept of 256", *(f"`{name}`" for name in methods))]
    rows.append(("100 %", *(f"{result['full']['accuracy']:.3f}" for _ in methods)))
    for keep in next(iter(methods.values())):
        rows.append((f"{float(keep):.0%}", *(f"{cells[keep]['accuracy']:.3f}" for cells in methods.values())))
    families = ", ".join(f"{name} {value:.3f}" for name, value in result["full"]["families"].items())
    return (
        f"**Accuracy of the demo model** on {result['questions']} held-out questions (exact match; random: mean of "
        f"three seeds; {result['date']}), made by `python benchmarks/accuracy.py`:\n\n{table(rows)}\n\n"
        f"Full model per question type: {families}. `keep` is what is left at the entrance of the language model, and "
        "for `pyramiddrop` and `fastv` in its last layer, after one or two layers that read more (the demo model has "
        "four). The demo model was trained with dropped backgrounds and supervised attention: methods that read its "
        "attention look better here than on public models."
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


def filled(page: str, name: str, content: str) -> str:
    """Return the page with ``content`` between the markers called ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def updated(page: str) -> str:
    """Return the page with every generated part renewed."""
    page = filled(page, "methods", method_table())
    return filled(page, "measured", f"{speed_text()}\n\n{accuracy_text()}")


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
