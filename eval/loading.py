"""From samples to what ``generate`` takes: pictures and clips read, prompts written, batches formed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image

from mmfast.eval.task import Sample, Task
from mmfast.media import load_image, read_video


@dataclass(frozen=True)
class Prompt:
    """Samples that are asked at once.

    Attributes:
        samples: one, or several of one kind.
        inputs: what ``model.generate`` takes; None if they could not be prepared.
        preprocess_ms: milliseconds this took, per sample.
        error: why the one sample could not be prepared.
    """

    samples: tuple[Sample, ...]
    inputs: Any
    preprocess_ms: float
    error: str = ""


def select(
    task: Task, *, limit: int | None = None, seed: int | None = None, shard: tuple[int, int] = (0, 1)
) -> Iterator[Sample]:
    """Yield the questions of one shard, one by one, without holding the others.

    Args:
        task: the data set.
        limit: questions in all shards together; None for all.
        seed: draw them by lot; None takes the first ones.
        shard: number of the shard from 0, and how many there are.

    Raises:
        ValueError: if ``limit`` or ``shard`` is out of range, or two samples share an id.

    Example:
        >>> from mmfast.eval.datasets import task
        >>> [sample.category for sample in select(task("shapes-image"), limit=4, shard=(1, 2))]
        ['color', 'size']
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(
            f"shard={index}/{count} must be one of 0/{max(1, count)} to {max(0, count - 1)}/{max(1, count)}"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for all questions")
    wanted: Iterable[Sample] = islice(task.samples(), limit)
    if seed is not None and limit is not None:
        size = _size(task)
        drawn = set(Random(seed).sample(range(size), min(limit, size)))  # noqa: S311 - no secret
        wanted = (sample for number, sample in enumerate(task.samples()) if number in drawn)
    seen: set[str] = set()
    for number, sample in enumerate(wanted):
        if sample.sample_id in seen:
            raise ValueError(
                f"task {task.name!r} has two samples with the id {sample.sample_id!r}; each needs one of its own"
            )
        seen.add(sample.sample_id)
        if number % count == index:
            yield sample


def count_selected(task: Task, *, limit: int | None = None, shard: tuple[int, int] = (0, 1)) -> int:
    """Count what :func:`select` yields.

    Example:
        >>> from mmfast.eval.datasets import task
        >>> count_selected(task("shapes-image"), limit=5, shard=(0, 2))
        3
    """
    size = _size(task) if limit is None else min(limit, _size(task))
    index, count = shard
    return len(range(index, size, count))


def batches(samples: Iterable[Sample], size: int) -> Iterator[tuple[Sample, ...]]:
    """Group samples with equally many pictures and frames, so that a batch is padded little.

    Yields:
        Groups of ``size``; what is left of each kind comes at the end.

    Example:
        >>> from mmfast.eval.datasets import task
        >>> [len(group) for group in batches(select(task("shapes-image"), limit=5), 2)]
        [2, 2, 1]
    """
    open_groups: dict[tuple[int, int, bool], list[Sample]] = {}
    for sample in samples:
        group = open_groups.setdefault((len(sample.images), len(sample.frames), sample.video is not None), [])
        group.append(sample)
        if len(group) == size:
            yield tuple(group)
            group.clear()
    yield from (tuple(group) for group in open_groups.values() if group)


def prepare_prompts(
    processor: Any, samples: Sequence[Sample], *, frames: int, device: torch.device, dtype: torch.dtype
) -> list[Prompt]:
    """Prepare samples as one prompt, or one by one where that fails, so that only the faulty ones are lost.

    Args:
        processor: of the model.
        samples: of one kind.
        frames: frames taken from a video file; decoded clips are shown as they are.
        device: where to put the tensors.
        dtype: floating type of the pixels.
    """
    begin = time.perf_counter()
    try:
        inputs = _inputs(processor, samples, frames, device, dtype)
    except Exception as error:
        if len(samples) > 1:
            return [
                prompt
                for sample in samples
                for prompt in prepare_prompts(processor, [sample], frames=frames, device=device, dtype=dtype)
            ]
        return [Prompt(tuple(samples), None, 0.0, error_text(error))]
    return [Prompt(tuple(samples), inputs, 1e3 * (time.perf_counter() - begin) / len(samples))]


def error_text(error: BaseException) -> str:
    """Write an error for a record.

    Example:
        >>> error_text(ValueError("no"))
        'ValueError: no'
    """
    return f"{type(error).__name__}: {error}"


def _size(task: Task) -> int:
    # Counting by reading may decode every picture of a data set.
    return len(task) if hasattr(task, "__len__") else sum(1 for _ in task.samples())


def _inputs(processor: Any, samples: Sequence[Sample], frames: int, device: torch.device, dtype: torch.dtype) -> Any:
    # Importing the adapters imports transformers, which takes seconds.
    from mmfast.adapters import prepare

    clips = [_clip(sample, frames) for sample in samples]
    return prepare(
        processor,
        [sample.question for sample in samples],
        [[_image(image) for image in sample.images] or None for sample in samples],
        [shown or None for shown, _ in clips],
        fps=[rate for _, rate in clips],
        device=device,
        dtype=dtype,
    )


def _image(image: Image.Image | Path) -> Image.Image:
    return load_image(image) if isinstance(image, Path) else image


def _clip(sample: Sample, frames: int) -> tuple[list[Image.Image], float]:
    """Return the frames a sample shows, and how many of them show one second."""
    if sample.video is None:
        return [_image(frame) for frame in sample.frames], sample.frames_per_second
    video = read_video(sample.video, num_frames=frames, start=sample.start, end=sample.end)
    return video.images(), video.rate
