"""Speed and memory of the core, measured side by side in one run.

    python benchmarks/speed.py [--device cpu|cuda] [--repeats N] [--out FILE.json]

A random-weight LLaVA (its answers mean nothing, its cost is that of a real one) reads 576 visual and 64
text tokens. Every figure is a ratio against the untouched model, taken in turn with it, median of
``--repeats`` runs; on the CPU in processor seconds of one thread, so that other work on the machine does
not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mmfast
from mmfast.token_pruning.before_llm.divprune import max_min_order

TEXT_TOKENS = 64
PLANS = (
    "divprune(keep=64)",
    "random(keep=64)",
    "fastv(layer=2, keep=64)",
    "fastv(layer=2, keep=288)",
    "pyramiddrop()",
    "divprune(keep=192) + fastv(layer=2, keep=64)",
)


def build(device: torch.device) -> LlavaForConditionalGeneration:
    """Build the model: 12 layers of width 768 (about 120 M parameters in all), a very small vision tower."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=2, image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=8192, hidden_size=768, intermediate_size=2560, num_hidden_layers=12, num_attention_heads=12,
            num_key_value_heads=12, max_position_embeddings=4096,
        ),
        image_token_id=8191,
    )  # fmt: skip
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return LlavaForConditionalGeneration(config).eval().to(device, dtype)


def prompt(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Make one prompt of 576 visual and 64 text tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 8000, (1, 576 + TEXT_TOKENS), generator=generator)
    ids[0, 5 : 5 + 576] = 8191
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


def cost(run: Callable[[], Any], device: torch.device) -> float:
    """Run once and return its cost in seconds: processor time on the CPU, device time elsewhere."""
    if device.type == "cpu":
        begin = time.process_time()
        run()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_turn(
    plain: Callable[[], Any], other: Callable[[], Any], repeats: int, device: torch.device
) -> list[tuple[float, float]]:
    """Run two things in turn; return the cost of each, pair by pair.

    Ratios are taken within a pair, so that they hold while the speed of the machine drifts.
    """
    pairs = [(cost(plain, device), cost(other, device)) for _ in range(repeats + 1)]
    return pairs[1:]


def middle(values: Iterable[float]) -> float:
    """Return the median."""
    return statistics.median(values)


@torch.inference_mode()
def prefill_table(model: Any, inputs: dict[str, torch.Tensor], repeats: int) -> list[dict[str, Any]]:
    """Prefill with each plan against the untouched model.

    The language model's own ratio, the one FLOPs predict, leaves out what both spend on vision.
    """
    rows = []
    pixels = inputs["pixel_values"]
    vision = statistics.median(
        cost(lambda: model.model.get_image_features(pixels), model.device) for _ in range(2 * repeats)
    )
    for plan in track(PLANS, description="prefill", transient=True):
        fast = mmfast.accelerate(model, plan)

        def untouched(fast: mmfast.Accelerated = fast) -> None:
            with fast.suspended():
                model(**inputs, logits_to_keep=1)

        def pruned() -> None:
            model(**inputs, logits_to_keep=1)

        pairs = in_turn(untouched, pruned, repeats, model.device)
        selection = statistics.median(_selection(fast, pruned) for _ in range(repeats))
        report = fast.report()
        fast.remove()
        ideal = report.full_flops / report.flops
        llm = middle((full - vision) / (short - vision) for full, short in pairs)
        full_cost = middle(full for full, _ in pairs)
        rows.append(
            {
                "plan": plan,
                "full_ms": 1e3 * full_cost,
                "plan_ms": 1e3 * middle(short for _, short in pairs),
                "vision_ms": 1e3 * vision,
                "speedup": middle(full / short for full, short in pairs),
                "llm_speedup": llm,
                "flops_ratio": ideal,
                "share_of_flops_ratio": llm / ideal,
                "selection_share_of_full_prefill": selection / full_cost,
            }
        )
    return rows


def _selection(fast: mmfast.Accelerated, run: Callable[[], None]) -> float:
    run()
    return fast.report().seconds["selection"]


@torch.inference_mode()
def overhead_table(model: Any, inputs: dict[str, torch.Tensor], repeats: int) -> list[dict[str, Any]]:
    """What a plan costs that drops nothing: keep=1.0, and a text-only prompt (armed but idle)."""
    text = {name: value[:, 576:] for name, value in inputs.items() if name != "pixel_values"}
    text["input_ids"] = text["input_ids"].clamp(max=8190)
    rows = []
    for name, plan, call in (
        ("keep=1.0, prefill", "divprune(keep=1.0) + pyramiddrop(keep=1.0)", inputs),
        ("armed but idle (text only), prefill", "divprune(keep=64) + pyramiddrop()", text),
    ):
        fast = mmfast.accelerate(model, plan)

        def untouched(fast: mmfast.Accelerated = fast, call: Any = call) -> None:
            with fast.suspended():
                model(**call, logits_to_keep=1)

        def armed(call: Any = call) -> None:
            model(**call, logits_to_keep=1)

        pairs = in_turn(untouched, armed, repeats, model.device)
        fast.remove()
        rows.append(_overhead(name, plan, pairs))
    rows.append(_decode_overhead(model, inputs, repeats))
    return rows


def _decode_overhead(model: Any, inputs: dict[str, torch.Tensor], repeats: int) -> dict[str, Any]:
    """One decode step after a prefill with keep=1.0."""
    steps = 8
    fast = mmfast.accelerate(model, "divprune(keep=1.0) + pyramiddrop(keep=1.0)")

    def decode(cache: Any) -> None:
        token = torch.full((1, 1), 5, device=model.device)
        for _ in range(steps):
            model(input_ids=token, past_key_values=cache)

    def prefilled() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1).past_key_values

    pairs = []
    for _ in range(repeats + 1):
        with fast.suspended():
            cache = prefilled()
            plain = cost(lambda cache=cache: decode(cache), model.device)
        cache = prefilled()
        armed = cost(lambda cache=cache: decode(cache), model.device)
        pairs.append((plain / steps, armed / steps))
    fast.remove()
    return _overhead("keep=1.0, one decode step", "divprune(keep=1.0) + pyramiddrop(keep=1.0)", pairs[1:])


def _overhead(what: str, plan: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "what": what,
        "plan": plan,
        "plain_ms": 1e3 * middle(plain for plain, _ in pairs),
        "armed_ms": 1e3 * middle(armed for _, armed in pairs),
        "ratio": middle(armed / plain for plain, armed in pairs),
    }


def selection_memory(device: torch.device) -> list[dict[str, Any]]:
    """Peak extra memory of divprune for images and long videos."""
    rows = []
    for total, kept in ((576, 64), (4096, 256), (8192, 256), (50_000, 1000)):
        features = torch.randn(total, 256, device=device)
        before = peak_start(device)
        begin = time.perf_counter()
        max_min_order(features, kept)
        peak = peak_end(device, before)
        rows.append(
            {
                "tokens": total,
                "kept": kept,
                "seconds": time.perf_counter() - begin,
                "peak_mb": peak / 1e6,
                "one_matrix_mb": 4 * total * total / 1e6,
            }
        )
    return rows


def peak_start(device: torch.device) -> int:
    """Begin to watch the peak of memory; hand the result to :func:`peak_end`."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of this process on Linux
    return _status("VmRSS")


def peak_end(device: torch.device, before: int) -> int:
    """Return the extra bytes at the peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
    return int(line.split()[1]) * 1024


def cycles(model: Any, times: int = 1000) -> dict[str, Any]:
    """Accelerate and remove many times; count what grows."""

    def census() -> tuple[int, int, int]:
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        registries = len(ALL_ATTENTION_FUNCTIONS.valid_keys()) + len(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys())
        return hooks, registries, sum(len(vars(module)) for module in model.modules())

    def run(count: int) -> None:
        for _ in range(count):
            mmfast.accelerate(model, "divprune(keep=64) + pyramiddrop()").remove()
        gc.collect()

    run(20)
    before = census()
    tracemalloc.start()
    begin_bytes = tracemalloc.get_traced_memory()[0]
    begin = time.perf_counter()
    run(times)
    seconds = time.perf_counter() - begin
    grown = tracemalloc.get_traced_memory()[0] - begin_bytes
    tracemalloc.stop()
    after = census()
    return {
        "cycles": times,
        "seconds": seconds,
        "python_bytes_grown": grown,
        "hooks_grown": after[0] - before[0],
        "registry_entries_grown": after[1] - before[1],
        "attributes_grown": after[2] - before[2],
    }


def machine(device: torch.device) -> dict[str, str]:
    """Describe the machine and the versions."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line),
            name,
        )
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "mmfast": mmfast.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def main() -> int:
    """Run everything, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9, help="counted runs of each (default 9)")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    model = build(device)
    inputs = prompt(model)
    console = Console(width=160)
    setting = (
        f"{sum(p.numel() for p in model.get_decoder().parameters()) / 1e6:.0f} M parameters in the decoder, "
        f"{model.config.text_config._attn_implementation} attention, {str(model.dtype).removeprefix('torch.')}, "
        f"batch 1, 576 + {TEXT_TOKENS} prompt tokens, random weights"
    )
    results = {
        "machine": machine(device),
        "setting": setting,
        "repeats": options.repeats,
        "prefill": prefill_table(model, inputs, options.repeats),
        "overhead": overhead_table(model, inputs, 2 * options.repeats),
        "divprune": selection_memory(device),
        "cycles": cycles(model),
    }
    console.print(results["machine"])
    console.print(setting)
    show(console, "Prefill against the untouched model (selection included)", results["prefill"])
    show(console, "Overhead of a plan that drops nothing", results["overhead"])
    show(console, "DivPrune selection alone", results["divprune"])
    show(console, "accelerate() and remove() in turn", [results["cycles"]])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
