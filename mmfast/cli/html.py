"""One self-contained page of a comparison: the table, and the kept patches over the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import Any

from mmfast.cli.common import Media
from mmfast.cli.drawings import shown_frames, views
from mmfast.cli.figures import figures, memory_note, versions
from mmfast.cli.patches import SCRIPT, STYLE, Gallery, slider, time_line
from mmfast.compare import PlanComparison, PlanRun
from mmfast.page import document, facts, table
from mmfast.plan import Plan
from mmfast.report import Report

_STYLE = (
    STYLE
    + """
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
td:first-child { font: .88rem/1.7 ui-monospace, monospace; }
td:nth-child(2) { min-width: 7rem; overflow-wrap: break-word; }
.verdict { border-left: 4px solid var(--bar); padding-left: .7rem; } .slow { border-color: var(--bad); }
.layers { display: flex; align-items: center; gap: .8rem; margin: .6rem 0 .8rem; font-size: .85rem; }
.layers svg { width: 100%; max-width: 26rem; height: 3.2rem; flex: 1 1 8rem; }
.rest { fill: var(--rest); } .bar { fill: var(--bar); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 46%), 1fr)); gap: .6rem; }
.pictures figure { max-width: 28rem; }
.key i { display: inline-block; width: 1.1em; height: 1.1em; vertical-align: -.2em; margin-right: .4em; }
.before { background: #23262d; } .last { border: 2px solid #ffc400; background: #8a95a8; }
i.inside { background: repeating-linear-gradient(135deg, #23262d 0 2px, #626b7a 2px 5px); }
"""
)


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
    told = {
        "media": ", ".join(media.names) + (f" ({len(media.frames)} frames)" if media.frames else ""),
        "model": model,
        "baseline": result.setting,
        "runs": f"median of {result.repeats} runs in turn after one warm-up of each; every run encodes the media anew",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
    }
    verdicts = "".join(
        f'<p class="verdict{" slow" if pair.total_ratio < 1.0 else ""}">{escape(text)}</p>\n'
        for pair, text in zip(result.pairs(), result.verdicts(), strict=True)
    )
    gallery = Gallery(processor)
    sections = "".join(_section(run, answer, media, gallery) for run, answer in zip(result.runs, answers, strict=True))
    body = f"""<header><h1>{escape(question)}</h1>{facts(told)}</header>
<main>{_table(result, answers)}
{verdicts}
<p class="soft">Small figures: share of the full model's. LLM prefill: multiply-accumulates of the language model over
the prompt. {escape(memory_note(result))}</p>
<p class="key">Patches: <span><i class="last"></i>read by the last layer</span>
<span><i class="inside"></i>entered the language model, dropped inside it</span>
<span><i class="before"></i>never entered it</span></p>
{sections}
</main>{gallery.definitions()}"""
    return document(f"mmfast: {question}", body, style=_STYLE, script=SCRIPT)


def _table(result: PlanComparison, answers: Sequence[str]) -> str:
    columns = [(f"{one.label} ({one.unit})" if one.unit else one.label, one) for one in figures(result)]
    rows = []
    for place, (run, answer) in enumerate(zip(result.runs, answers, strict=True)):
        cells = [escape(run.plan), escape(answer) or "<em>none</em>"]
        for _, figure in columns:
            share = f" <small>{figure.shares[place]}</small>" if figure.shares[place] else ""
            cells.append(f"{figure.values[place]}{share}")
        rows.append(("", cells))
    return table(["plan", "answer", *(label for label, _ in columns)], rows)


def _section(run: PlanRun, answer: str, media: Media, gallery: Gallery) -> str:
    report = run.report
    layers = len(report.tokens_per_layer[0])
    chosen, note = views(report, media)
    if any(method.kind == "Merger" for method in Plan.of(run.plan).methods):
        note = f"Dimmed patches were merged into the clear ones, not discarded. {note}"
    pictures = "".join(gallery.figure(view, layers) for view in chosen)
    dropped = any(record.left < record.tokens for record in report.media)
    return f"""<section><h2>{escape(run.plan)}</h2>
<p>{escape(answer) or "<em>no answer</em>"}</p>
<p class="soft">{report.visual_tokens} visual tokens; {report.entered_tokens} enter the language model,
{sum(record.left for record in report.media)} reach its last layer, {report.layer_average:.0f} per layer on average.</p>
{_layers(report)}{time_line(shown_frames(report, media) or []) if dropped else ""}
{slider(layers) if dropped and chosen else ""}<div class="pictures">{pictures}</div>
{f'<p class="soft">{escape(note)}</p>' if note else ""}</section>
"""


def _layers(report: Report) -> str:
    """Draw one bar per layer as SVG, its height the tokens read; grey is what the full model reads."""
    counts, full = report.tokens_per_layer[0], report.full_tokens[0]
    step, gap = 100 / len(counts), min(1.0, 20 / len(counts))
    bars = "".join(
        f'<rect class="rest" x="{layer * step:.2f}" y="0" width="{step - gap:.2f}" height="100"/>'
        f'<rect class="bar" data-layer="{layer}" x="{layer * step:.2f}" y="{100 - 100 * count / full:.2f}" '
        f'width="{step - gap:.2f}" height="{100 * count / full:.2f}">'
        f"<title>layer {layer}: {count} tokens</title></rect>"
        for layer, count in enumerate(counts)
    )
    label = f"tokens per layer: {', '.join(map(str, counts))}"
    return (
        f'<div class="layers"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'{bars}</svg><span class="soft">tokens that each of the {len(counts)} layers reads, text included: '
        f"{counts[0]} first, {counts[-1]} last</span></div>"
    )
