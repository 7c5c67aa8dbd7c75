"""Side-by-side timing of a model with and without a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.report import Stopwatch, Timing


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


def in_turn(
    model: nn.Module,
    sides: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int,
    repeats: int,
    after_run: Callable[[str], None] | None = None,
) -> dict[str, tuple[Timing, Tensor]]:
    """Generate under several settings in turn, after one warm-up of each.

    Args:
        model: a model with ``generate``.
        sides: name -> what to enter around each run.
        inputs: what the processor returned.
        max_new_tokens: tokens to generate.
        repeats: counted runs of each.
        after_run: called with the name after every run, inside its context; for progress.

    Returns:
        Per name the run of median total: its times, and the new tokens, int64 ``[B, T]``.

    Raises:
        ValueError: if ``repeats`` or ``max_new_tokens`` is below 1.
    """
    for name, value in (("repeats", repeats), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    runs: dict[str, list[tuple[Timing, Tensor]]] = {name: [] for name in sides}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, enter in sides.items():
                with enter():
                    run = timed_generate(model, inputs, max_new_tokens)
                    if after_run is not None:
                        after_run(name)
                if turn:
                    runs[name].append(run)
    return {name: sorted(done, key=lambda run: run[0].total)[repeats // 2] for name, done in runs.items()}


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
