"""What a plan did to the last prompt: tokens, seconds, FLOPs and bytes, and whether it paid."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmfast.budget import LanguageShape, prefill_flops
from mmfast.decoding import Compilation, Drafting
from mmfast.tokens import Layout

PHASES = ("vision", "selection", "prefill", "decode")
"""The phases of one request whose seconds are reported."""


class Stopwatch:
    """Take times on any device without making a GPU wait.

    On CUDA a mark is an event of the stream, read when the report is asked for.

    Example:
        >>> watch = Stopwatch(torch.device("cpu"))
        >>> begin = watch.mark()
        >>> watch.seconds(begin, watch.mark()) >= 0.0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Take a time."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the seconds between two marks."""
        if self._cuda:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3
        return float(end - begin)


@dataclass(frozen=True)
class MediaRecord:
    """What happened to the tokens of one image or video.

    Attributes:
        row: row of the batch.
        modality: ``"image"`` or ``"video"``.
        tokens: visual tokens the model made.
        entered: of these, how many the language model read in its first layer.
        left: how many its last layer read.
        entered_indices: int64 ``[entered]``, which ones, on the CPU.
        left_indices: int64 ``[left]``, which ones.
        layout: where the tokens lie, for drawing.
        frames: frames of a video, or temporal patches where frames are joined; 0 for an image.
        encoded_frames: int64 numbers of those that were encoded, where a method chose; None = all.
        layers_alive: int64 ``[tokens]``, how many layers, from the first on, had each token at hand; None where only
            the first and the last are known.
    """

    row: int
    modality: str
    tokens: int
    entered: int
    left: int
    entered_indices: Tensor
    left_indices: Tensor
    layout: Layout
    frames: int = 0
    encoded_frames: Tensor | None = None
    layers_alive: Tensor | None = None

    @property
    def frame_count(self) -> str:
        """How many frames of a video were encoded, in words; empty where all were."""
        chosen = self.encoded_frames
        return "" if chosen is None else f"{chosen.numel()} of {self.frames} frames encoded, "


@dataclass(frozen=True)
class Timing:
    """Medians of a side-by-side measurement, in seconds.

    Attributes:
        first_token: from the call to the end of the prefill, vision and selection included.
        per_token: one decode step.
        total: the whole call.
        new_tokens: tokens generated.
    """

    first_token: float
    per_token: float
    total: float
    new_tokens: int


@dataclass(frozen=True)
class Comparison:
    """The untouched and the accelerated model on the same inputs, in turn, in one run.

    Attributes:
        baseline: the untouched model.
        accelerated: the model with the plan.
        repeats: runs of each, after one warm-up.
        setting: attention backend, dtype, device, batch size and prompt length.
        agreement: share of generated tokens that are equal, position by position.
    """

    baseline: Timing
    accelerated: Timing
    repeats: int
    setting: str
    agreement: float

    @property
    def prefill_ratio(self) -> float:
        """Baseline over accelerated time to the first token; above 1 is faster."""
        return self.baseline.first_token / self.accelerated.first_token

    @property
    def total_ratio(self) -> float:
        """Baseline over accelerated time of the whole call; above 1 is faster."""
        return self.baseline.total / self.accelerated.total

    @property
    def decode_ratio(self) -> float:
        """Baseline over accelerated time per token after the first; above 1 is faster."""
        return self.baseline.per_token / self.accelerated.per_token if self.accelerated.per_token else 1.0

    def verdict(self, *, with_setting: bool = True) -> str:
        """Say plainly whether the plan paid.

        Args:
            with_setting: name the setting too; leave it out only where it stands beside the sentence.
        """
        ratio, setting = self.total_ratio, f"; {self.setting}" if with_setting else ""
        if ratio < 1.0:
            return (
                f"This plan is SLOWER than the untouched model: {1 / ratio:.2f}x the time end to end "
                f"({self.accelerated.total:.3f} s against {self.baseline.total:.3f} s{setting})."
            )
        return (
            f"{ratio:.2f}x faster end to end, {self.prefill_ratio:.2f}x to the first token, "
            f"{self.decode_ratio:.2f}x per token after it (median of {self.repeats}{setting})."
        )


@dataclass(frozen=True)
class LayerWork:
    """What one layer worked on in the prefill of one prompt.

    Attributes:
        attending: tokens that attended, the count a report shows.
        shown: tokens of which the layer made keys and values.
        fed: tokens that passed the feed-forward part.
    """

    attending: int
    shown: int
    fed: int


@dataclass
class Report:
    """The last prompt with images or videos, and the tokens generated after it.

    Attributes:
        plan: the plan in text form.
        model: class of the model.
        shape: sizes of the language model, for the predictions.
        media: one record per image or video, row by row.
        text_tokens: per row, tokens of the prompt that are not visual.
        work: per row, what each decoder layer worked on.
        seconds: phase -> seconds; the phases are :data:`PHASES`.
        decode_steps: forward passes after the prefill.
        kv_bytes: bytes of the key/value cache after the prefill, measured; of a static cache those of its buffers,
            room for tokens to come included. 0 without a cache.
        kv_value_bytes: bytes of one cached value.
        peak_bytes: peak memory so far of the device (CUDA) or of the whole process (CPU).
        comparison: a side-by-side measurement, if one was made.
        note: why there is nothing to report, if so.
        device: type of the device.
        reread_tokens: tokens of earlier turns that were read again so that this question could choose.
        drafting: what drafting gave in the last call of ``generate``; None without a drafter.
        compilation: whether decode steps ran compiled in it; None where that was not asked for.
    """

    plan: str
    model: str
    shape: LanguageShape
    media: list[MediaRecord] = field(default_factory=list)
    text_tokens: list[int] = field(default_factory=list)
    work: list[list[LayerWork]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    decode_steps: int = 0
    kv_bytes: int = 0
    kv_value_bytes: int = 4
    peak_bytes: int = 0
    comparison: Comparison | None = None
    note: str = ""
    device: str = "cpu"
    reread_tokens: int = 0
    drafting: Drafting | None = None
    compilation: Compilation | None = None

    @property
    def tokens_per_layer(self) -> list[list[int]]:
        """Per row, how many tokens each decoder layer read."""
        return [[layer.attending for layer in layers] for layers in self.work]

    @property
    def full_tokens(self) -> list[int]:
        """Per row, the tokens every layer of the untouched model reads."""
        return [
            text + sum(item.tokens for item in self.media if item.row == row)
            for row, text in enumerate(self.text_tokens)
        ]

    @property
    def flops(self) -> int:
        """Multiply-accumulates of the prefill of the language model, all rows."""
        return sum(
            self.shape.layer_flops(layer.attending, layer.shown, projected=layer.shown, fed=layer.fed)
            for layers in self.work
            for layer in layers
        )

    @property
    def full_flops(self) -> int:
        """The same for the untouched model."""
        return sum(prefill_flops(self.shape, [n] * self.shape.layers) for n in self.full_tokens)

    @property
    def full_kv_bytes(self) -> int:
        """Bytes of the untouched model's cache after the prefill, without padding."""
        return sum(self.shape.kv_bytes([n] * self.shape.layers, self.kv_value_bytes) for n in self.full_tokens)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens the model made, all images and rows."""
        return sum(item.tokens for item in self.media)

    @property
    def entered_tokens(self) -> int:
        """Visual tokens the language model read in its first layer."""
        return sum(item.entered for item in self.media)

    @property
    def layer_average(self) -> float:
        """Visual tokens per layer, averaged over the layers, all rows together."""
        if not self.tokens_per_layer:
            return 0.0
        text = sum(self.text_tokens)
        per_layer = [sum(counts) - text for counts in zip(*self.tokens_per_layer, strict=True)]
        return float(sum(per_layer)) / len(per_layer)

    def with_comparison(self, comparison: Comparison) -> Report:
        """Return the same report with a measurement attached."""
        return replace(self, comparison=comparison)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        values: dict[str, Any] = {
            "plan": self.plan,
            "model": self.model,
            "media": [
                {
                    "row": item.row,
                    "modality": item.modality,
                    "tokens": item.tokens,
                    "entered": item.entered,
                    "left": item.left,
                    "frames": item.frames,
                    "encoded_frames": None if item.encoded_frames is None else item.encoded_frames.tolist(),
                }
                for item in self.media
            ],
            "text_tokens": self.text_tokens,
            "tokens_per_layer": self.tokens_per_layer,
            "visual_tokens": self.visual_tokens,
            "entered_tokens": self.entered_tokens,
            "layer_average": self.layer_average,
            "seconds": self.seconds,
            "decode_steps": self.decode_steps,
            "flops": self.flops,
            "full_flops": self.full_flops,
            "kv_bytes": self.kv_bytes,
            "full_kv_bytes": self.full_kv_bytes,
            "peak_bytes": self.peak_bytes,
            "device": self.device,
            "reread_tokens": self.reread_tokens,
            "drafting": None if self.drafting is None else self.drafting.to_dict(),
            "compilation": None if self.compilation is None else vars(self.compilation).copy(),
            "note": self.note,
        }
        if self.comparison is not None:
            measured = self.comparison
            values["comparison"] = {
                "baseline": vars(measured.baseline),
                "accelerated": vars(measured.accelerated),
                "repeats": measured.repeats,
                "setting": measured.setting,
                "agreement": measured.agreement,
                "verdict": measured.verdict(),
            }
        return values

    def __str__(self) -> str:
        lines = [f"plan     {self.plan}", f"model    {self.model}"]
        if self.note:
            lines.append(self.note)
            return "\n".join([*lines, *self._decoding()])
        for item in self.media:
            lines.append(
                f"{item.modality:<8} row {item.row}: {item.frame_count}{item.tokens} tokens -> "
                f"{item.entered} into the LLM -> {item.left} in the last layer"
            )
        for row, layers in enumerate(self.tokens_per_layer):
            lines.append(f"layers   row {row}: {_runs(layers)} tokens (text included)")
        lines.append(
            f"compute  {self.flops / 1e9:.2f} GMAC of {self.full_flops / 1e9:.2f} "
            f"({_share(self.flops, self.full_flops)} of the full prefill)"
        )
        if self.kv_bytes:
            lines.append(
                f"KV cache {self.kv_bytes / 1e6:.2f} MB of {self.full_kv_bytes / 1e6:.2f} "
                f"({_share(self.kv_bytes, self.full_kv_bytes)})"
            )
        if self.reread_tokens:
            lines.append(f"turn     {self.reread_tokens} tokens of earlier turns read again for this question")
        times = ", ".join(f"{phase} {1e3 * self.seconds.get(phase, 0.0):.1f} ms" for phase in PHASES)
        lines.append(f"time     {times} ({self.decode_steps} decode steps)")
        lines += self._decoding()
        if self.peak_bytes:
            whose = "device" if self.device == "cuda" else "process"
            lines.append(f"memory   {whose} peak so far {self.peak_bytes / 1e6:.0f} MB")
        if self.comparison is None:
            lines.append("speed    not compared: measure(inputs) or `mmfast compare` does it")
        else:
            lines.append(f"speed    {self.comparison.verdict()}")
        return "\n".join(lines)

    def _decoding(self) -> list[str]:
        """Say what was done beside plain decode steps."""
        found = {"drafting": self.drafting, "compile ": self.compilation}
        return [f"{name} {value}" for name, value in found.items() if value is not None]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _runs(values: list[int]) -> str:
    """Write ``[8, 8, 8, 4]`` as ``8 x3, 4 x1``."""
    parts: list[tuple[int, int]] = []
    for value in values:
        if parts and parts[-1][0] == value:
            parts[-1] = (value, parts[-1][1] + 1)
        else:
            parts.append((value, 1))
    return ", ".join(f"{value} x{times}" for value, times in parts)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the device on CUDA, of the process elsewhere.

    Example:
        >>> peak_memory(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return 0
    # Linux counts kilobytes.
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
