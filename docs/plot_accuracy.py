"""Draw accuracy against visual tokens per layer, one panel per method, from the newest committed results.

python docs/plot_accuracy.py    # writes docs/images/accuracy.svg; needs the extra 'eval'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from accuracy import half_width  # noqa: E402 - a script in another folder, not a package

RESULTS = ROOT / "benchmarks" / "results"
OUT = ROOT / "docs" / "images" / "accuracy.svg"
PER_ROW = 8
OWN, CHANCE = "#0b6e99", "#b0b0b0"
LEAST = 8.0
"""Fewer tokens than this, down to none at all, are drawn here."""


def curve(cells: dict[str, Any]) -> tuple[list[float], list[float], list[float]]:
    """Return tokens per layer, accuracy and half widths, by tokens."""
    points = sorted(
        (own["layer_average"], own["accuracy"], half_width(own["accuracy"], own["answers"]))
        for own in cells.values()
        if "refused" not in own
    )
    tokens, shares, widths = zip(*points, strict=True) if points else ((), (), ())
    return list(tokens), list(shares), list(widths)


def draw(content: dict[str, Any]) -> plt.Figure:
    """Draw every method beside random dropping at its stage."""
    shown = {name: cells for name, cells in content["methods"].items() if curve(cells)[0]}
    rows = -(-len(shown) // PER_ROW)
    figure, panels = plt.subplots(
        rows, PER_ROW, figsize=(2.0 * PER_ROW, 1.75 * rows), sharex=True, sharey=True, squeeze=False
    )
    full = content["full"]["accuracy"]
    for panel, (name, cells) in zip(panels.flat, shown.items(), strict=False):
        chance = "random" if content["stages"][name] == "before_llm" else "random_in_llm"
        panel.axhline(full, color="black", linewidth=0.6, linestyle=":")
        for which, color, width in ((content["methods"][chance], CHANCE, 1.0), (cells, OWN, 1.6)):
            tokens, shares, widths = curve(which)
            places = [max(LEAST, value) for value in tokens]
            panel.errorbar(places, shares, yerr=widths, color=color, linewidth=width, marker="o", markersize=2.5)
        panel.set_xscale("log", base=2)
        panel.set_xlim(LEAST * 0.85, 310)
        panel.set_xticks([16, 64, 256], ["16", "64", "256"])
        panel.minorticks_off()
        panel.set_title(name, fontsize=8)
        panel.tick_params(labelsize=6)
        panel.grid(alpha=0.25, linewidth=0.4)
    for panel in list(panels.flat)[len(shown) :]:
        panel.axis("off")
    figure.supxlabel("visual tokens per layer (of 256; fewer than 8 stand at the left edge)", fontsize=9)
    figure.supylabel("exact match", fontsize=9)
    figure.suptitle(
        "Accuracy of the demo model against visual tokens per layer. Blue: the method. Grey: random dropping at the "
        f"same stage. Dotted: nothing dropped. Bars: 95 % intervals, {content['questions']} questions.",
        fontsize=9,
    )
    figure.tight_layout(rect=(0.01, 0.01, 1, 0.97))
    return figure


def main() -> None:
    """Write the picture."""
    matplotlib.use("svg")
    newest = sorted(RESULTS.glob("accuracy-*.json"))[-1]
    # Without a fixed salt the ids inside the file differ from run to run.
    matplotlib.rcParams["svg.hashsalt"] = "mmfast"
    OUT.parent.mkdir(parents=True, exist_ok=True)
    draw(json.loads(newest.read_text())).savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
