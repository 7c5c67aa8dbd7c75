"""Side-by-side timing of a model with and without a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.report import Comparison, Stopwatch, Timing


class _FirstToken:
    """A streamer that only notes when the prompt and the first token went by."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self.marks: list[Any] = []

    def put(self, value: Tensor) -> None:
        """Note a call of ``generate``: first with the prompt, then once per token."""
        self.marks.append(self._watch.mark())

    def end(self) -> None:
        """Do nothing."""


def timed_generate(model: nn.Module, inputs: Mapping[str, Any], max_new_tokens: int) -> tuple[Timing, Tensor]:
    """Generate greedily and time it.

    Args:
        model: a model with ``generate``.
        inputs: what the processor returned.
        max_new_tokens: tokens to generate.

    Returns:
        The times and the new tokens, int64 ``[B, T]``.
    """
    device = next(model.parameters()).device
    watch = Stopwatch(device)
    streamer = _FirstToken(watch)
    prompt = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    if inputs["input_ids"].shape[0] == 1:
        options["streamer"] = streamer
    begin = watch.mark()
    output: Tensor = model.generate(**inputs, **options)  # type: ignore[operator]
    end = watch.mark()
    total = watch.seconds(begin, end)
    new = output[:, prompt:]
    if len(streamer.marks) < 2:
        # generate() streams single prompts only: measure the first token of a batch by itself.
        begin = watch.mark()
        model.generate(**inputs, **{**options, "max_new_tokens": 1})  # type: ignore[operator]
        first = watch.seconds(begin, watch.mark())
    else:
        first = watch.seconds(begin, streamer.marks[1])
    steps = max(1, new.shape[1] - 1)
    return Timing(first, max(0.0, total - first) / steps, total, int(new.shape[1])), new


def compare(
    model: nn.Module,
    suspended: Callable[[], AbstractContextManager[nn.Module]],
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int,
    repeats: int,
) -> Comparison:
    """Run the untouched and the accelerated model in turn and compare medians.

    Args:
        model: the accelerated model.
        suspended: gives the untouched model for a while.
        inputs: what the processor returned.
        max_new_tokens: tokens to generate.
        repeats: counted runs of each, after one warm-up.

    Raises:
        ValueError: if ``repeats`` or ``max_new_tokens`` is below 1.
    """
    for name, value in (("repeats", repeats), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    runs: dict[str, list[tuple[Timing, Tensor]]] = {"baseline": [], "accelerated": []}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for side, context in (("baseline", suspended()), ("accelerated", nullcontext(model))):
                with context:
                    run = timed_generate(model, inputs, max_new_tokens)
                if turn:
                    runs[side].append(run)
    middle = {
        side: sorted((timing for timing, _ in done), key=lambda timing: timing.total)[repeats // 2]
        for side, done in runs.items()
    }
    return Comparison(
        middle["baseline"],
        middle["accelerated"],
        repeats,
        setting_of(model, inputs),
        agreement(runs["baseline"][0][1], runs["accelerated"][0][1]),
    )


def agreement(first: Tensor, second: Tensor) -> float:
    """Share of positions at which two token sequences are equal; a missing token counts as different.

    Example:
        >>> agreement(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2]]))
        0.6666666666666666
    """
    longest = max(first.shape[1], second.shape[1])
    shared = min(first.shape[1], second.shape[1])
    if longest == 0:
        return 1.0
    same = (first[:, :shared] == second[:, :shared]).sum().item()
    return float(same) / (first.shape[0] * longest)


def setting_of(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Name what a time depends on: attention backend, dtype, device, threads, batch and prompt length."""
    parameter = next(model.parameters())
    backend = getattr(model.config, "_attn_implementation", "unknown")
    rows, length = inputs["input_ids"].shape
    where = str(parameter.device)
    if parameter.device.type == "cpu":
        where += f" with {torch.get_num_threads()} threads"
    dtype = str(parameter.dtype).removeprefix("torch.")
    return f"{backend} attention, {dtype}, {where}, batch {rows}, prompt of {length} tokens"
