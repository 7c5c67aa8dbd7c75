"""What a results file holds: a header for the run, and a record for every question."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfast.eval.task import Outcome, Sample, Scored

FORMAT = 1
"""Raised whenever older files can no longer be read as they are."""

_MUST_FIT = (
    "format",
    "task",
    "task_version",
    "task_options",
    "plan",
    "model",
    "weights",
    "dtype",
    "max_new_tokens",
    "batch",
    "frames",
)


@dataclass(frozen=True)
class Header:
    """What all records of a file have in common.

    Attributes:
        task: name of the task.
        task_version: of its samples and its scorer.
        task_options: fields of the task, its folder aside.
        metric: its headline.
        chance: the headline of blind guessing.
        plan: the plan in text form.
        model: the model's name.
        weights: a fingerprint of the weights.
        dtype: floating type of the weights.
        max_new_tokens: tokens an answer may have.
        batch: questions answered at once; only batches of one are timed.
        frames: frames taken from a video file.
        limit: questions asked at most; None for all.
        seed: which questions were drawn; None for the first ones.
        shard: which part of the questions, as ``"0/2"``.
        warmup: runs before the first that counts.
        versions: releases of the software.
        hardware: device, threads and attention, on which the times depend.
        created: when, UTC.
        format: of the file.
    """

    task: str
    task_version: int
    task_options: dict[str, Any]
    metric: str
    chance: float
    plan: str
    model: str
    weights: str
    dtype: str
    max_new_tokens: int
    batch: int
    frames: int
    limit: int | None = None
    seed: int | None = None
    shard: str = "0/1"
    warmup: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, str | int] = field(default_factory=dict)
    created: str = ""
    format: int = FORMAT

    @property
    def key(self) -> tuple[str, str, str]:
        """What is one run: task, plan and model."""
        return self.task, self.plan, self.model

    def misfits(self, other: Header) -> list[str]:
        """Say what must be equal in one file or in a merge, and is not; one text each."""
        return [
            f"{name}: {getattr(self, name)!r} there, {getattr(other, name)!r} now"
            for name in _MUST_FIT
            if getattr(self, name) != getattr(other, name)
        ]

    @property
    def setting(self) -> tuple[Any, ...]:
        """What makes two plans comparable: everything that must fit, but the plan."""
        return tuple(
            json.dumps(getattr(self, name), sort_keys=True, default=str) for name in _MUST_FIT if name != "plan"
        )


@dataclass(frozen=True)
class Record:
    """One answered question.

    Counts and costs are None where they were not measured: for questions without media, for failures, and times
    and memory for batches of more than one. Multiply-accumulates (MACs) are what much of the literature calls FLOPs;
    here one MAC is two FLOPs.

    Attributes:
        question_id: the sample.
        task: name of the task.
        prediction: the raw text; "" for a failure.
        parsed: what the scorer read out of it.
        answers: the accepted answers.
        score: what it was worth; 0 for a failure.
        question: what was asked.
        category: kind of the question.
        cluster: what correlated questions share.
        choices: options of a multiple-choice question.
        sample_details: what the summary of the task needs of the sample.
        scored_details: what it needs of the answer.
        n_visual_in: visual tokens that the model made.
        n_visual_kept: of these, how many entered the language model.
        n_visual_left: how many its last layer read.
        n_visual_layer_average: how many its layers read on average.
        n_text: the other tokens of the prompt.
        n_new: tokens generated.
        preprocess_ms: from the picture or clip to tensors; video decoding included, for a batch its share.
        encoder_ms: vision tower and projector.
        reduce_ms: scoring, selection and gathering.
        prefill_ms: language model, to the logits of the first token.
        ttft_ms: from tensors to the first token: encoder, reduction, prefill and sampling; no preprocessing.
        decode_tok_s: tokens per second after the first; None for answers of one token.
        e2e_ms: the whole call of ``generate``; for a batch its share.
        prefill_macs: multiply-accumulates of the prefill of the language model.
        prefill_flops: twice as many floating-point operations.
        full_prefill_macs: multiply-accumulates without a plan.
        kv_bytes: the cache after the prefill.
        full_kv_bytes: the same without a plan.
        peak_memory_bytes: most that the device held, weights included; None on a CPU, whose mark never falls.
        peak_above_weights_bytes: the same above what it held before the question.
        tokens_per_forward: tokens per forward pass, where tokens are drafted.
        error: why the question failed; "" where it did not.
    """

    question_id: str
    task: str
    prediction: str
    parsed: str
    answers: tuple[str, ...]
    score: float
    question: str = ""
    category: str = ""
    cluster: str = ""
    choices: tuple[str, ...] = ()
    sample_details: dict[str, Any] = field(default_factory=dict)
    scored_details: dict[str, Any] = field(default_factory=dict)
    n_visual_in: int | None = None
    n_visual_kept: int | None = None
    n_visual_left: int | None = None
    n_visual_layer_average: float | None = None
    n_text: int | None = None
    n_new: int | None = None
    preprocess_ms: float | None = None
    encoder_ms: float | None = None
    reduce_ms: float | None = None
    prefill_ms: float | None = None
    ttft_ms: float | None = None
    decode_tok_s: float | None = None
    e2e_ms: float | None = None
    prefill_macs: int | None = None
    prefill_flops: int | None = None
    full_prefill_macs: int | None = None
    kv_bytes: int | None = None
    full_kv_bytes: int | None = None
    peak_memory_bytes: int | None = None
    peak_above_weights_bytes: int | None = None
    tokens_per_forward: float | None = None
    error: str = ""

    def outcome(self) -> Outcome:
        """Return what the summary of a task reads; the media are not in the file and not in the sample."""
        sample = Sample(
            self.question_id,
            self.question,
            tuple(self.answers),
            choices=tuple(self.choices),
            category=self.category,
            cluster=self.cluster,
            details=self.sample_details,
        )
        return Outcome(sample, self.prediction, Scored(self.score, self.parsed, self.scored_details))


@dataclass(frozen=True)
class Run:
    """One task under one plan on one model, from one file or from several shards.

    Attributes:
        header: of the first file.
        records: every sample once, by its id.
        hardware: the different machines that took part.
    """

    header: Header
    records: tuple[Record, ...]
    hardware: tuple[Mapping[str, str | int], ...]


def plain_text(value: object) -> str:
    """Write what JSON does not know.

    Of a callable its name, for its text holds an address in memory; of a path the last part, for it lies elsewhere on
    other machines.

    Example:
        >>> plain_text(len), plain_text(3 + 4j), plain_text(Path("here/replies.jsonl"))
        ('builtins.len', '(3+4j)', 'replies.jsonl')
    """
    if isinstance(value, Path):
        return value.name
    if not callable(value):
        return str(value)
    named = getattr(value, "func", value)
    named = named if hasattr(named, "__qualname__") else type(named)
    return f"{named.__module__}.{named.__qualname__}"
