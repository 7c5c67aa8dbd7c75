"""How something is trained: the numbers of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """The numbers of a training run.

    Attributes:
        steps: updates of the weights.
        batch: examples per update and process, over all accumulated passes.
        accumulate: passes whose gradients make up one update; it divides ``batch``.
        optimizer: ``"adamw"``, or ``"muon"`` for matrices with AdamW for the rest.
        learning_rate: peak of it; for Muon that of the matrices.
        other_rate: peak of AdamW's rate beside Muon; 0 takes half of ``learning_rate``.
        weight_decay: decoupled.
        warmup: steps over which the rate rises from 0.
        decay_from: share of the steps after which it falls.
        schedule: how it falls.
        final: what is left of the peak at the end.
        clip: largest norm of the gradient; 0 for none.
        clip_value: largest entry of the gradient, before that; 0 for none.
        adam_beta2: how slowly AdamW forgets squared gradients; beside Muon it is 0.98.
        precision: ``"no"`` computes as the weights are stored, ``"bf16"`` under autocast.
        seed: of the data and of everything that is drawn.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of the log.
        on_bad: what becomes of data that cannot be used, and of a loss that is not finite: ``"stop"`` or ``"skip"``.

    Raises:
        ValueError: naming a field that is out of range.

    Example:
        >>> Settings(steps=100, batch=8, warmup=10).rate_at(5)
        0.5
    """

    steps: int
    batch: int
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    other_rate: float = 0.0
    weight_decay: float = 0.0
    warmup: int = 100
    decay_from: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final: float = 0.02
    clip: float = 1.0
    clip_value: float = 0.0
    adam_beta2: float = 0.999
    precision: Literal["no", "bf16"] = "no"
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 20
    on_bad: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "accumulate": 1, "warmup": 0, "seed": 0, "checkpoint_every": 1, "log_every": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise ValueError(f"{name}={value!r} must be an int of at least {bound}")
        for name in ("learning_rate", "other_rate", "weight_decay", "clip", "clip_value"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a finite number of at least 0")
        for name in ("decay_from", "final"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must be a number between 0 and 1")
        if not is_number(self.adam_beta2) or not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2={self.adam_beta2!r} must be a number of at least 0 and below 1")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} must divide batch={self.batch}")
        choices = {
            "optimizer": ("adamw", "muon"),
            "schedule": ("cosine", "linear", "constant"),
            "precision": ("no", "bf16"),
            "on_bad": ("stop", "skip"),
        }
        for name, legal in choices.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(legal)}")

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step as a share of its peak."""
        if step < self.warmup:
            return step / self.warmup
        begin = max(self.warmup, self.decay_from * self.steps)
        if self.schedule == "constant" or step < begin:
            return 1.0
        done = min(1.0, (step - begin) / max(1.0, self.steps - begin))
        falling = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.final + (1 - self.final) * falling


def is_number(value: object) -> bool:
    """Say whether a value counts as a number; booleans do not, though Python thinks so.

    Example:
        >>> is_number(2), is_number("2"), is_number(True)
        (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool)
