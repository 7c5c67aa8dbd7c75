"""Draw accuracy against bytes of the cache, one panel per method, from the newest committed results.

python docs/plot_cache.py    # writes docs/images/cache.svg; needs the extra 'eval'
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]

RESULTS = ROOT / "benchmarks" / "results"
OUT = ROOT / "docs" / "images" / "cache.svg"
PER_ROW = 8
FIRST, SECOND, BASELINE = "#8fbfd6", "#0b6e99", "#b0b0b0"
LEAST = 0.06


def curve(cells: dict[str, Any], figure: str) -> tuple[list[float], list[float], list[float]]:
    """Return shares of the cache, accuracies and half widths, by share; where parts are read, by what is read."""
    points = sorted(
        (own.get("read_share", own["kv_share"]), own[figure]["share"], own[figure]["half_width"])
        for own in cells.values()
        if "refused" not in own
    )
    places, shares, widths = zip(*points, strict=True) if points else ((), (), ())
    return list(places), list(shares), list(widths)


def draw(content: dict[str, Any]) -> plt.Figure:
    """Draw every method beside StreamingLLM, which looks at nothing but places."""
    own, kinds = content["accuracy"], content["kinds"]
    # Kinds side by side: what the horizontal axis means differs between them.
    order = ("Evictor", "CacheScorer", "ModelEvictor", "Adjuster", "Packer", "Retriever")
    shown = [name for name, cells in own["methods"].items() if kinds[name] in order and curve(cells, "accuracy")[0]]
    shown.sort(key=lambda name: (max(2, order.index(kinds[name])), name))
    rows = -(-len(shown) // PER_ROW)
    figure, panels = plt.subplots(
        rows, PER_ROW, figsize=(2.0 * PER_ROW, 1.75 * rows), sharex=True, sharey=True, squeeze=False
    )
    baseline = own["methods"]["streaming_llm"]
    for panel, name in zip(panels.flat, shown, strict=False):
        cells = own["methods"][name]
        panel.axhline(own["full"]["second_question"]["share"], color="black", linewidth=0.6, linestyle=":")
        drawn = ((baseline, "second_question", BASELINE, 1.0), (cells, "accuracy", FIRST, 1.2))
        for which, what, color, width in (*drawn, (cells, "second_question", SECOND, 1.6)):
            places, shares, widths = curve(which, what)
            panel.errorbar(places, shares, yerr=widths, color=color, linewidth=width, marker="o", markersize=2.5)
        panel.set_xscale("log", base=2)
        panel.set_xlim(LEAST, 1.15)
        panel.set_ylim(0, 1.03)
        panel.set_xticks([0.1, 0.2, 0.5, 1.0], ["0.1", "0.2", "0.5", "1"])
        panel.minorticks_off()
        kind = kinds[name].lower()
        panel.set_title(f"{name} ({kind})" if kind in ("packer", "retriever", "adjuster") else name, fontsize=7.5)
        panel.tick_params(labelsize=6)
        panel.grid(alpha=0.25, linewidth=0.4)
    for panel in list(panels.flat)[len(shown) :]:
        panel.axis("off")
    figure.supxlabel(
        "bytes of the cache after the prompt, of the untouched model's (retrievers: entries that a step reads)",
        fontsize=9,
    )
    figure.supylabel("exact match", fontsize=9)
    figure.suptitle(
        "Accuracy of the demo model against the size of the cache. Dark blue: a second question, asked on the "
        "compressed cache. Light blue: the question in the prompt.\nGrey: streaming_llm's second question. Dotted: "
        "the untouched "
        f"model's. Bars: 95 % intervals, {own['full']['accuracy']['answers']} and "
        f"{own['full']['second_question']['answers']} questions.",
        fontsize=9,
    )
    figure.tight_layout(rect=(0.01, 0.01, 1, 0.98))
    return figure


def main() -> None:
    """Write the picture."""
    matplotlib.use("svg")
    newest = sorted(RESULTS.glob("cache-*.json"))[-1]
    # Without a fixed salt the ids inside the file differ from run to run.
    matplotlib.rcParams["svg.hashsalt"] = "mmfast"
    OUT.parent.mkdir(parents=True, exist_ok=True)
    draw(json.loads(newest.read_text())).savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
