"""Draw what a compressed cache still answers, one panel per method, from the newest committed results.

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
OWN, FIRST, BASE = "#0b6e99", "#e08e0b", "#b0b0b0"
BASELINE = "streaming_llm"


def curve(cells: dict[str, Any], which: str) -> tuple[list[float], list[float], list[float]]:
    """Return shares of the bytes, of right answers, and their half widths, by bytes."""
    points = sorted(
        (own["kv_share"], own[which]["share"], own[which]["half_width"])
        for own in cells.values()
        if "refused" not in own
    )
    held, right, widths = zip(*points, strict=True) if points else ((), (), ())
    return list(held), list(right), list(widths)


def draw(content: dict[str, Any]) -> plt.Figure:
    """Draw the second question (and the first, fainter) of every method beside keeping the ends only."""
    own = content["accuracy"]
    shown = {name: cells for name, cells in own["methods"].items() if curve(cells, "second_question")[0]}
    rows = -(-len(shown) // PER_ROW)
    figure, panels = plt.subplots(
        rows, PER_ROW, figsize=(2.0 * PER_ROW, 1.75 * rows), sharex=True, sharey=True, squeeze=False
    )
    for panel, (name, cells) in zip(panels.flat, shown.items(), strict=False):
        panel.axhline(own["full"]["second_question"]["share"], color="black", linewidth=0.6, linestyle=":")
        for source, which, color, width in (
            (own["methods"][BASELINE], "second_question", BASE, 1.0),
            (cells, "accuracy", FIRST, 1.0),
            (cells, "second_question", OWN, 1.6),
        ):
            held, right, widths = curve(source, which)
            panel.errorbar(held, right, yerr=widths, color=color, linewidth=width, marker="o", markersize=2.5)
        panel.set_xlim(0, 1.6)
        panel.set_ylim(0, 1.02)
        panel.set_title(name, fontsize=8)
        panel.tick_params(labelsize=6)
        panel.grid(alpha=0.25, linewidth=0.4)
    for panel in list(panels.flat)[len(shown) :]:
        panel.axis("off")
    figure.supxlabel("key/value bytes, share of the untouched cache (what retrieves keeps all of it)", fontsize=9)
    figure.supylabel("exact match", fontsize=9)
    figure.suptitle(
        "Second question on the compressed cache (blue), first question (orange), streaming_llm's second (grey), "
        "untouched (dotted)",
        fontsize=9,
    )
    figure.tight_layout(rect=(0.02, 0.01, 1, 1))
    return figure


def main() -> None:
    """Write the picture."""
    matplotlib.use("svg")
    # The same picture for the same results: no date, no random ids.
    matplotlib.rcParams["svg.hashsalt"] = "mmfast"
    content = json.loads(sorted(RESULTS.glob("cache-*.json"))[-1].read_text())
    draw(content).savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
