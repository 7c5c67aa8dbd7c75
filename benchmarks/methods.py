"""What every method costs and saves, measured side by side in one run.

    python benchmarks/methods.py [--device cpu|cuda] [--repeats N] [--methods NAME ...] [--out FILE.json]

Two tables. The first reduces the 576 visual tokens of a random-weight LLaVA (its answers mean nothing, its
cost is that of a real one) to 64: what choosing costs as a share of the untouched prefill, and what is
gained net of it. What reading the vision encoder costs counts as choosing. The second runs each choice
alone on the tokens of 16 and of 64 video frames of 196 tokens: extra memory, time, and the exponent with
which time grows. CPU figures are processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from speed import TEXT_TOKENS, build, cost, in_turn, machine, middle, peak_end, peak_start, prompt, show

import mmfast
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.base import BeforeLLM
from mmfast.token_pruning.layers import LayerBypass, LayerDropper, LayerTokens
from mmfast.tokens import Layout, VisualTokens

WIDTH, HEADS, HEAD = 768, 12, 64
FRAMES, SIDE = (16, 64), 14


def plan_of(info: mmfast.MethodInfo, keep: int | float) -> str:
    """Write the plan that keeps ``keep``, or the method's own where it has no such option."""
    return f"{info.name}(keep={keep})" if "keep" in info.options else f"{info.name}()"


@torch.inference_mode()
def prefill_row(model: Any, inputs: dict[str, torch.Tensor], info: mmfast.MethodInfo, repeats: int) -> dict[str, Any]:
    """Prefill with one method against the untouched model."""
    plan = plan_of(info, 64)
    try:
        fast = mmfast.accelerate(model, plan)
    except ValueError as error:
        return {"method": info.name, "plan": plan, "note": str(error)}

    def untouched() -> None:
        with fast.suspended():
            model(**inputs, logits_to_keep=1)

    def pruned() -> None:
        model(**inputs, logits_to_keep=1)

    pixels = inputs["pixel_values"]

    def encode() -> None:
        model.model.get_image_features(pixels)

    def encode_untouched() -> None:
        with fast.suspended():
            encode()

    try:
        pairs = in_turn(untouched, pruned, repeats, model.device)
        reading = middle(
            max(0.0, own - plain) for plain, own in in_turn(encode_untouched, encode, repeats, model.device)
        )
        choosing = []
        for _ in range(repeats):
            pruned()
            choosing.append(fast.report().seconds["selection"])
        report = fast.report()
    finally:
        fast.remove()
    full = middle(plain for plain, _ in pairs)
    speedup = middle(plain / own for plain, own in pairs)
    return {
        "method": info.name,
        "plan": plan,
        "entered": report.entered_tokens,
        "layer_average": report.layer_average,
        "selection_share": (statistics.median(choosing) + reading) / full,
        "flops_ratio": report.full_flops / report.flops,
        "speedup": speedup,
        "slower": speedup < 1.0,
        "note": "",
    }


def visual_tokens(method: Any, frames: int) -> VisualTokens:
    """Make the tokens of a video with whatever signals a method declares."""
    total = frames * SIDE * SIDE
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(total, WIDTH, generator=generator)
    signals = {name: _signal(signal, total, generator) for name, signal in method.vision_signals().items()}
    if "text_embeds" in method.needs:
        signals["text_embeds"] = torch.randn(TEXT_TOKENS, WIDTH, generator=generator)
    return VisualTokens(features, Layout.grid(SIDE, SIDE, frames=frames, modality="video"), signals=signals)


def _signal(signal: Any, total: int, generator: torch.Generator) -> torch.Tensor:
    if signal.kind in ("cls_attention", "cls_logits", "received_attention"):
        return torch.rand(total, generator=generator)
    if signal.kind == "cls_features":
        return torch.randn(1, WIDTH, generator=generator)
    width = WIDTH if signal.heads == "join" or signal.kind == "patch_features" else HEAD
    return torch.randn(total, width, generator=generator)


def layer_tokens(method: Any, frames: int) -> LayerTokens:
    """Make the tokens of a prompt with a video, as a layer sees them."""
    visual = frames * SIDE * SIDE
    total = visual + TEXT_TOKENS
    generator = torch.Generator().manual_seed(0)

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    candidates = torch.arange(5, 5 + visual)
    return LayerTokens(
        hidden=states(total, WIDTH),
        candidates=candidates,
        origin=candidates - 5,
        media=torch.zeros_like(candidates),
        total=visual,
        media_totals=(visual,),
        layouts=(Layout.grid(SIDE, SIDE, frames=frames, modality="video"),),
        attention=AttentionView(states(HEADS, total, HEAD), states(HEADS, total, HEAD), states(HEADS, total, HEAD)),
        embeds=states(total, WIDTH),
        normed=states(total, WIDTH),
        activations=states(total, 2560) if "activations" in method.needs else None,
        signals={name: _signal(signal, visual, generator) for name, signal in method.vision_signals().items()},
    )


@torch.inference_mode()
def choice_row(info: mmfast.MethodInfo) -> dict[str, Any]:
    """Run one choice on two sizes of video."""
    # Before the LLM a count; a schedule cannot average less than what its first layers read.
    keep = 256 if info.stage == "before_llm" else 0.35
    method = info.method(keep=keep) if "keep" in info.options else info.method()
    row: dict[str, Any] = {"method": info.name}
    if any(signal.kind == "groups" for signal in method.vision_signals().values()):
        return {**row, "note": "decides inside the vision encoder, not on finished tokens"}
    seconds = []
    for frames in FRAMES:
        tokens = visual_tokens(method, frames) if isinstance(method, BeforeLLM) else layer_tokens(method, frames)
        before = peak_start(torch.device("cpu"))
        begin = time.process_time()
        try:
            _choose(method, tokens)
        except ValueError as error:
            return {**row, "note": str(error)}
        seconds.append(time.process_time() - begin)
        row[f"mb_{frames}"] = peak_end(torch.device("cpu"), before) / 1e6
        row[f"seconds_{frames}"] = seconds[-1]
    row["exponent"] = math.log(seconds[1] / max(seconds[0], 1e-6)) / math.log(FRAMES[1] / FRAMES[0])
    return {**row, "note": ""}


def _choose(method: Any, tokens: Any) -> None:
    depth = 12
    if isinstance(method, BeforeLLM):
        method(tokens)
    elif isinstance(method, LayerDropper):
        method(tokens, next(event for event in method.events(depth) if method.drops(event, tokens.media_totals)))
    elif isinstance(method, LayerBypass):
        method.route(tokens, method.layers_of(depth)[0], depth)
    else:
        method.visible([tokens.candidates], torch.arange(5 + tokens.total, tokens.hidden.shape[0]))


def main() -> int:
    """Run everything, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each (default 5)")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    listed = [
        info
        for info in mmfast.methods()
        if info.stage in ("before_llm", "in_llm")
        # What needs a model of its own is measured by voco.py.
        and info.kind != "Compressor"
        and (not options.methods or info.name in options.methods)
    ]
    model = build(device)
    inputs = prompt(model)
    setting = (
        f"{sum(p.numel() for p in model.get_decoder().parameters()) / 1e6:.0f} M parameters in the decoder, "
        f"{model.config.text_config._attn_implementation} attention, {str(model.dtype).removeprefix('torch.')}, "
        f"batch 1, 576 + {TEXT_TOKENS} prompt tokens, random weights; full prefill "
        f"{1e3 * statistics.median(cost(lambda: model(**inputs, logits_to_keep=1), device) for _ in range(5)):.0f} ms"
    )
    console = Console(width=180)
    prefill = [
        prefill_row(model, inputs, info, options.repeats)
        for info in track(listed, description="prefill", transient=True)
    ]
    choices = [choice_row(info) for info in track(listed, description="videos", transient=True)]
    console.print(machine(device))
    console.print(setting)
    measured = [row for row in prefill if "speedup" in row]
    show(console, "576 -> 64 visual tokens against the untouched prefill", measured)
    show(console, "The choice alone on videos", [row for row in choices if "exponent" in row])
    for row in (*prefill, *choices):
        if row["note"]:
            console.print(f"{row['method']}: {row['note']}")
    cheap = sum(row["selection_share"] < 0.05 for row in measured)
    console.print(f"{cheap} of {len(measured)} methods choose in less than 5 % of the full prefill")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "machine": machine(device),
            "setting": setting,
            "repeats": options.repeats,
            "prefill": prefill,
            "choices": choices,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
