"""One self-contained page of a comparison: the table, and the kept patches over the pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from datetime import UTC, datetime

from PIL import Image

import mmfast
from mmfast.compare import PlanComparison, PlanRun
from mmfast.draw import overlay

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5d6675; --paper: #fbfbfa; --line: #dcdfe4; --bar: #d08700;
  --rest: #e7e9ee; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #9aa4b5; --paper: #14171d; --line: #2c323d;
  --bar: #ffc400; --rest: #262c36; } }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem; }
code { font-family: ui-monospace, monospace; font-size: .95em; }
.soft { color: var(--soft); margin: .15rem 0; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: right; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; white-space: normal; min-width: 6rem; }
th { color: var(--soft); font-weight: 600; font-size: .8rem; white-space: normal; vertical-align: bottom; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .5rem; margin: .6rem 0; }
.pictures img { width: 100%; display: block; border-radius: 4px; }
svg { width: 100%; height: 4.5rem; display: block; } svg .rest { fill: var(--rest); } svg .bar { fill: var(--bar); }
.key span { display: inline-block; width: .9em; height: .9em; vertical-align: -.1em; margin: 0 .3em 0 1em;
  border: 1px solid var(--line); }
.slow { border-left: 4px solid #d1335b; padding-left: .7rem; }
"""


def page(
    result: PlanComparison,
    answers: Sequence[str],
    pictures: Sequence[Image.Image],
    question: str,
    model: str,
    demo_note: str,
) -> str:
    """Write the page.

    Args:
        result: the comparison.
        answers: the answer of each run.
        pictures: the images and frames the model saw, in order.
        question: the question.
        model: class of the model.
        demo_note: what to say of the demo model; empty for others.

    Returns:
        HTML without any outside resource.
    """
    from mmfast.cli.compare import memory_note, rows

    header, *body = rows(result, list(answers))
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    verdicts = "".join(
        f"<p{' class=slow' if 'SLOWER' in text else ''}>{html.escape(text)}</p>" for text in result.verdicts()
    )
    note = f"<p class=soft>{html.escape(demo_note)}</p>" if demo_note else ""
    sections = "".join(_section(run, answer, pictures) for run, answer in zip(result.runs, answers, strict=True))
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>mmfast: {html.escape(question)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(question)}</h1>
<p class=soft>{html.escape(model)}; median of {result.repeats} runs in turn; {html.escape(result.setting)};
mmfast {mmfast.__version__}; {date}</p>{note}
<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>
{verdicts}
<p class=soft>{html.escape(memory_note(result))} GMAC: 10<sup>9</sup> multiply-accumulates of the language model's
prefill. Agreement: share of generated tokens equal to the full model's.</p>
<p class="soft key"><span style="background:#1a1d25"></span>dropped before the language model
<span style="background:#767676"></span>dropped inside it
<span style="outline:2px solid var(--bar)"></span>read by its last layer</p>
{sections}
</body></html>
"""


def _section(run: PlanRun, answer: str, pictures: Sequence[Image.Image]) -> str:
    report = run.report
    drawn = "".join(
        f'<img alt="kept patches of picture {number + 1}" src="{_data(picture)}">'
        for number, picture in enumerate(_overlays(run, pictures))
    )
    pictures_html = f"<div class=pictures>{drawn}</div>" if drawn else "<p class=soft>Nothing to draw.</p>"
    return f"""<h2><code>{html.escape(run.plan)}</code></h2>
<p>{html.escape(answer) or "<em>no answer</em>"}</p>
<p class=soft>{report.visual_tokens} visual tokens, {report.entered_tokens} into the language model,
{report.layer_average:.0f} per layer on average. Tokens per layer, first to last, text included:</p>
{_bars(run)}{pictures_html}"""


def _overlays(run: PlanRun, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Draw every picture with its record; a video's record covers several pictures."""
    drawn: list[Image.Image] = []
    rest = list(pictures)
    for record in run.report.media:
        shown = int(record.layout.frame.max()) + 1 if record.modality == "video" else 1
        # Temporal patches join frames: the pictures of a video are spread over them evenly.
        own, rest = (rest, []) if record.modality == "video" else (rest[:1], rest[1:])
        for number, picture in enumerate(own):
            frame = min(shown - 1, number * shown // max(1, len(own)))
            drawn.append(overlay(picture, record, frame) if record.layout.boxes is not None else picture)
    return drawn


def _bars(run: PlanRun) -> str:
    """Draw one bar per layer as SVG, its height the tokens read."""
    layers = run.report.tokens_per_layer[0] if run.report.tokens_per_layer else []
    full = max(run.report.full_tokens[:1] or [1])
    if not layers:
        return ""
    width = 100 / len(layers)
    bars = "".join(
        f'<rect class=rest x="{i * width:.3f}%" y="0" width="{0.9 * width:.3f}%" height="100%"/>'
        f'<rect class=bar x="{i * width:.3f}%" y="{100 - 100 * n / full:.2f}%" width="{0.9 * width:.3f}%" '
        f'height="{100 * n / full:.2f}%"><title>layer {i}: {n} tokens</title></rect>'
        for i, n in enumerate(layers)
    )
    return f'<svg role="img" aria-label="tokens per layer: {layers}">{bars}</svg>'


def _data(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
