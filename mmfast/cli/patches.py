"""Kept patches as SVG: one picture for all plans, over it what each plan drops, layer by layer."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmfast.cli.drawings import View, as_seen
from mmfast.report import MediaRecord

WIDTH = 448

STYLE = """
.picture { width: 100%; height: auto; display: block; border-radius: 4px; }
.gone { fill: #101218; fill-opacity: .82; } .edge { fill: none; stroke: #ffc400; stroke-width: 1.6; }
.gone.inside { fill: url(#stripes); fill-opacity: 1; }
.step { display: flex; flex-wrap: wrap; align-items: center; gap: .6rem; font-size: .9rem; margin: .4rem 0 .7rem; }
.step input { flex: 1 1 10rem; max-width: 22rem; } .step button { font: inherit; color: inherit; border-radius: 6px;
  background: var(--paper); border: 1px solid var(--line); padding: .1rem .7rem; cursor: pointer; }
.time { width: 100%; max-width: 40rem; height: 4.5rem; display: block; margin: .2rem 0; }
.time .enter { fill: var(--bar); fill-opacity: .45; } rect.now { stroke: var(--ink); stroke-width: 1.5;
  vector-effect: non-scaling-stroke; }
"""

# A step before layer 0 shows what the vision encoder made.
SCRIPT = """
for (const box of document.querySelectorAll('.step')) {
  const section = box.closest('section'), slider = box.querySelector('input'), said = box.querySelector('output');
  const button = box.querySelector('button'), layers = +slider.max;
  const show = () => {
    const step = +slider.value;
    for (const part of section.querySelectorAll('[data-alive]'))
      part.toggleAttribute('hidden', step <= +part.dataset.alive);
    for (const part of section.querySelectorAll('[data-from]'))
      part.toggleAttribute('hidden', step < +part.dataset.from || step > +part.dataset.to);
    for (const bar of section.querySelectorAll('[data-layer]'))
      bar.classList.toggle('now', step < layers && +bar.dataset.layer === step - 1);
    said.textContent = step ? 'read by layer ' + (step - 1) : 'made by the vision encoder';
  };
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = 'play'; };
  button.addEventListener('click', () => {
    if (timer) { stop(); return; }
    slider.value = 0;
    show();
    button.textContent = 'stop';
    timer = setInterval(() => { slider.value = +slider.value + 1; show(); if (+slider.value >= layers) stop(); },
      Math.max(150, 4000 / layers));
  });
  slider.addEventListener('input', () => { stop(); show(); });
  box.hidden = false;
  show();
}
"""

STRIPES = (
    '<pattern id="stripes" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" fill="#101218" fill-opacity=".45"/><rect width="2" height="6" fill="#101218" '
    'fill-opacity=".7"/></pattern>'
)


class Gallery:
    """The pictures of a page, each held once however many plans show it.

    Args:
        processor: the processor of the model, which may cut pictures before the model sees them.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._held: dict[tuple[int, str], tuple[Image.Image, str, int, str]] = {}

    def figure(self, view: View, layers: int) -> str:
        """Draw one picture with the patches that a plan drops.

        Args:
            view: the picture; its layout must know where the tokens lie.
            layers: layers of the language model.
        """
        name, height = self._picture(view)
        label = escape(f"{view.caption} with dropped patches dimmed")
        return (
            f'<figure><svg class="picture" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
            f'<use href="#{name}"/>{patches(view, layers, height)}</svg>'
            f"<figcaption>{escape(view.caption)}</figcaption></figure>"
        )

    def definitions(self) -> str:
        """Return the element that holds the pictures; it must be on the page."""
        images = "".join(
            f'<image id="{name}" width="{WIDTH}" height="{height}" href="{data}"/>'
            for _, name, height, data in self._held.values()
        )
        return f'<svg width="0" height="0" aria-hidden="true"><defs>{STRIPES}{images}</defs></svg>'

    def _picture(self, view: View) -> tuple[str, int]:
        # The picture is held too, so that its id() stays its own.
        key = (id(view.picture), view.record.modality)
        if key not in self._held:
            seen = as_seen(self._processor, view.picture, view.record.modality).convert("RGB")
            height = max(1, round(WIDTH * seen.height / seen.width))
            small = seen.resize((WIDTH, height), Image.Resampling.BICUBIC)
            self._held[key] = (view.picture, f"picture-{len(self._held)}", height, _data(small))
        _, name, height, _ = self._held[key]
        return name, height


def patches(view: View, layers: int, height: int) -> str:
    """Draw the dropped patches of one picture, and a line around what is left at each stage.

    Everything is there for every layer; what does not belong to the last one is hidden.
    """
    layout = view.record.layout
    if layout.boxes is None:
        raise ValueError("the adapter of this model does not know where its tokens lie, so nothing can be drawn")
    here = (layout.frame == view.frame) & (layout.tile == view.tile) & (layout.col >= 0)
    alive = alive_layers(view.record, layers)[here]
    scale = torch.tensor([WIDTH, height, WIDTH, height])
    boxes = (layout.boxes[here] * scale).round().long()
    parts, before = [], -1
    for stage in sorted(set(alive.tolist())):
        visible = boxes[alive >= stage]
        if len(visible) < len(boxes):
            shown = "" if stage >= layers else " hidden"
            parts.append(
                f'<path class="edge" data-from="{before + 1}" data-to="{stage}"{shown} d="{_outline(visible)}"/>'
            )
        if stage < layers:
            kind = "gone inside" if stage else "gone"
            parts.insert(0, f'<path class="{kind}" data-alive="{stage}" d="{_filled(boxes[alive == stage])}"/>')
        before = stage
    return "".join(parts)


def alive_layers(record: MediaRecord, layers: int) -> Tensor:
    """Return how many layers had each token at hand, int64 ``[tokens]``.

    Where a record does not know, a token that was dropped inside counts for one layer.
    """
    if record.layers_alive is not None:
        return record.layers_alive
    alive = torch.zeros(record.tokens, dtype=torch.long)
    alive[record.entered_indices] = 1
    alive[record.left_indices] = layers
    return alive


def slider(layers: int) -> str:
    """Return the control that steps through the layers; the page's script shows it."""
    return (
        f'<div class="step screen" hidden><button type="button">play</button>'
        f'<input type="range" min="0" max="{layers}" value="{layers}" aria-label="layer"><output class="soft"></output>'
        "</div>"
    )


def time_line(shown: Sequence[View]) -> str:
    """Draw one bar per frame of a video: the tokens it has, those that enter and those the last layer reads.

    Args:
        shown: every frame, in order; images among them are passed over.

    Returns:
        HTML; empty for fewer than two frames.
    """
    frames = [view for view in shown if view.seconds is not None]
    if len(frames) < 2:
        return ""
    counts = [_counts(view) for view in frames]
    most, step = max(max(total for total, _, _ in counts), 1), 100 / len(frames)
    width = step - min(1.0, step / 5)
    bars = "".join(
        f"<g><title>{escape(view.caption)}: {total} tokens, {entered} enter, {left} read by the last layer</title>"
        + "".join(
            f'<rect class="{kind}" x="{place * step:.2f}" y="{100 - 100 * value / most:.2f}" width="{width:.2f}" '
            f'height="{100 * value / most:.2f}"/>'
            for kind, value in (("rest", total), ("enter", entered), ("bar", left))
        )
        + "</g>"
        for place, (view, (total, entered, left)) in enumerate(zip(frames, counts, strict=True))
    )
    label = "tokens read by the last layer, per frame: " + ", ".join(str(left) for _, _, left in counts)
    return (
        f'<svg class="time" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{label}">{bars}'
        f'</svg><p class="soft">Tokens per frame, {escape(frames[0].caption)} to {escape(frames[-1].caption)}: '
        "all of them (grey), those that enter the language model (light), those its last layer reads (full).</p>"
    )


def _counts(view: View) -> tuple[int, int, int]:
    here = view.record.layout.frame == view.frame if view.record.modality == "video" else None
    if here is None:
        return view.record.tokens, view.record.entered, view.record.left
    return (
        int(here.sum()),
        int(here[view.record.entered_indices].sum()),
        int(here[view.record.left_indices].sum()),
    )


def _filled(boxes: Tensor) -> str:
    """Write boxes ``[n, 4]`` as a path; neighbours in a row are one."""
    merged: list[list[int]] = []
    for left, top, right, bottom in sorted(boxes.tolist(), key=lambda box: (box[1], box[0])):
        if merged and merged[-1][1:4:2] == [top, bottom] and merged[-1][2] == left:
            merged[-1][2] = right
        else:
            merged.append([left, top, right, bottom])
    return "".join(f"M{left} {top}H{right}V{bottom}H{left}z" for left, top, right, bottom in merged)


def _outline(boxes: Tensor) -> str:
    """Write the border of a set of boxes: the sides that only one of them has."""
    sides: dict[tuple[int, int, int, int], int] = {}
    for left, top, right, bottom in boxes.tolist():
        for side in (
            (left, top, right, top),
            (left, bottom, right, bottom),
            (left, top, left, bottom),
            (right, top, right, bottom),
        ):
            sides[side] = sides.get(side, 0) + 1
    alone = [side for side, count in sides.items() if count == 1]
    return "".join(f"M{x} {y}L{right} {bottom}" for x, y, right, bottom in alone)


def _data(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
