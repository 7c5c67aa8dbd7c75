"""One self-contained page of a comparison: the table, and the kept patches over the pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import Any

from PIL import Image

from mmfast.cli.common import Media
from mmfast.cli.drawings import drawings
from mmfast.cli.figures import figures, memory_note, versions
from mmfast.compare import PlanComparison, PlanRun
from mmfast.plan import Plan
from mmfast.report import Report

# Nothing is fetched and nothing runs, whatever a question or an answer contains.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1b2130; --soft: #5b6474; --paper: #fcfcfb; --card: #fff; --line: #dde0e6;
  --bar: #c98500; --rest: #e6e8ed; --bad: #c22a52; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebf1; --soft: #9da7b8; --paper: #13161c; --card: #1a1e26;
  --line: #2d343f; --bar: #ffc400; --rest: #2a303b; --bad: #ff6b8f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font: 600 1.05rem/1.4 ui-monospace, monospace; margin: 0 0 .3rem; }
p { margin: .35rem 0; } .soft, small { color: var(--soft); } small { font-size: .8em; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1.2rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: 0 0 1rem; }
th, td { padding: .45rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: .78rem; line-height: 1.25; vertical-align: bottom; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
td:first-child { font: .88rem/1.7 ui-monospace, monospace; } td small { display: block; }
td:nth-child(2) { min-width: 7rem; overflow-wrap: break-word; }
.verdict { border-left: 4px solid var(--bar); padding-left: .7rem; } .slow { border-color: var(--bad); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1.2rem 0; }
.layers { display: flex; align-items: center; gap: .8rem; margin: .6rem 0 .8rem; font-size: .85rem; }
.layers svg { width: 100%; max-width: 26rem; height: 3.2rem; flex: 1 1 8rem; }
.rest { fill: var(--rest); } .bar { fill: var(--bar); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 46%), 1fr)); gap: .6rem; }
figure { margin: 0; max-width: 28rem; } figure img { width: 100%; display: block; border-radius: 4px; }
figcaption { color: var(--soft); font-size: .8rem; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; color: var(--soft); }
.key i { display: inline-block; width: 1.1em; height: 1.1em; vertical-align: -.2em; margin-right: .4em; }
.before { background: #23262d; } .last { border: 2px solid #ffc400; background: #8a95a8; }
.inside { background: repeating-linear-gradient(135deg, #23262d 0 2px, #626b7a 2px 5px); }
@media (max-width: 50rem) {
  thead { display: none; } table, tbody { display: block; }
  tr { display: block; border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0; padding: .3rem .7rem; }
  td, td:first-child, td:nth-child(2) { display: flex; gap: .5rem; border: 0; padding: .1rem 0; text-align: right; }
  td::before { content: attr(data-label); color: var(--soft); flex: 1; text-align: left; font-family: system-ui; }
  td:first-child::before { content: none; } td:first-child { font-weight: 600; text-align: left; }
  td small { display: inline; margin-left: .4rem; }
}
@media print { section { break-inside: avoid; } }
"""


def page(
    result: PlanComparison, answers: Sequence[str], media: Media, processor: Any, question: str, model: str
) -> str:
    """Write the page.

    Args:
        result: the comparison.
        answers: the answer of each run.
        media: the images and frames that were asked about.
        processor: the processor of the model, which may cut pictures before the model sees them.
        question: the question.
        model: what to call the model.

    Returns:
        HTML without any outside resource.
    """
    facts = {
        "media": ", ".join(media.names) + (f" ({len(media.frames)} frames)" if media.frames else ""),
        "model": model,
        "baseline": result.setting,
        "runs": f"median of {result.repeats} runs in turn after one warm-up of each; every run encodes the media anew",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
    }
    verdicts = "".join(
        f'<p class="verdict{" slow" if "SLOWER" in text else ""}">{escape(text)}</p>\n' for text in result.verdicts()
    )
    sections = "".join(
        _section(run, answer, media, processor) for run, answer in zip(result.runs, answers, strict=True)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>mmfast: {escape(question)}</title><style>{_STYLE}</style></head><body>
<header><h1>{escape(question)}</h1>
<dl>{"".join(f"<dt>{name}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())}</dl></header>
<main>{_table(result, answers)}
{verdicts}
<p class="soft">Small figures: share of the full model's. LLM prefill: multiply-accumulates of the language model over
the prompt. {escape(memory_note(result))}</p>
<p class="key">Patches: <span><i class="last"></i>read by the last layer</span>
<span><i class="inside"></i>entered the language model, dropped inside it</span>
<span><i class="before"></i>never entered it</span></p>
{sections}
</main></body></html>
"""


def _table(result: PlanComparison, answers: Sequence[str]) -> str:
    columns = [(f"{one.label} ({one.unit})" if one.unit else one.label, one) for one in figures(result)]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("plan", "answer", *(label for label, _ in columns)))
    rows = []
    for place, (run, answer) in enumerate(zip(result.runs, answers, strict=True)):
        cells = [("plan", escape(run.plan)), ("answer", escape(answer) or "<em>none</em>")]
        for label, figure in columns:
            share = f" <small>{figure.shares[place]}</small>" if figure.shares[place] else ""
            cells.append((escape(label), f"{figure.values[place]}{share}"))
        # The inner span keeps value and share together where a phone shows cells as lines.
        row = "".join(f'<td data-label="{label}"><span>{cell}</span></td>' for label, cell in cells)
        rows.append(f"<tr>{row}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _section(run: PlanRun, answer: str, media: Media, processor: Any) -> str:
    report = run.report
    drawn, note = drawings(report, media, processor)
    if any(method.kind == "Merger" for method in Plan.of(run.plan).methods):
        note = f"Dimmed patches were merged into the clear ones, not discarded. {note}"
    shown = "".join(
        f'<figure><img alt="{escape(caption)} with dropped patches dimmed" src="{_data(image)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, image in drawn
    )
    return f"""<section><h2>{escape(run.plan)}</h2>
<p>{escape(answer) or "<em>no answer</em>"}</p>
<p class="soft">{report.visual_tokens} visual tokens; {report.entered_tokens} enter the language model,
{sum(record.left for record in report.media)} reach its last layer, {report.layer_average:.0f} per layer on average.</p>
{_layers(report)}<div class="pictures">{shown}</div>{f'<p class="soft">{escape(note)}</p>' if note else ""}</section>
"""


def _layers(report: Report) -> str:
    """Draw one bar per layer as SVG, its height the tokens read; grey is what the full model reads."""
    counts, full = report.tokens_per_layer[0], report.full_tokens[0]
    step, gap = 100 / len(counts), min(1.0, 20 / len(counts))
    bars = "".join(
        f'<rect class="rest" x="{layer * step:.2f}" y="0" width="{step - gap:.2f}" height="100"/>'
        f'<rect class="bar" x="{layer * step:.2f}" y="{100 - 100 * count / full:.2f}" width="{step - gap:.2f}" '
        f'height="{100 * count / full:.2f}"><title>layer {layer}: {count} tokens</title></rect>'
        for layer, count in enumerate(counts)
    )
    label = f"tokens per layer: {', '.join(map(str, counts))}"
    return (
        f'<div class="layers"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'{bars}</svg><span class="soft">tokens that each of the {len(counts)} layers reads, text included: '
        f"{counts[0]} first, {counts[-1]} last</span></div>"
    )


def _data(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
