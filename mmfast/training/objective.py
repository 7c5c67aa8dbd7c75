"""What a trainer trains: an objective knows its data, its loss and what is kept of it at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

IGNORED = -100
"""Label of a place where nothing is to be learned."""


@dataclass(frozen=True)
class Loss:
    """What one batch gave.

    Attributes:
        total: scalar, to be minimised.
        figures: further numbers for the log.
    """

    total: Tensor
    figures: Mapping[str, float] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """A thing to learn. Every parameter that asks for gradients is trained and checkpointed.

    What a step sees depends on the seed, the step and the part alone, so that a run that was broken off goes on as
    if nothing had happened.
    """

    @abstractmethod
    def batch(self, step: int, part: int, parts: int, size: int) -> Any:
        """Make the examples of a step.

        Args:
            step: which step, from 0.
            part: which share of the step this is, among processes and accumulated passes.
            parts: number of shares.
            size: examples in this share.

        Returns:
            Anything that :meth:`forward` takes.

        Raises:
            BadExample: for data that cannot be used, where the settings say to stop.
        """

    @abstractmethod
    def forward(self, batch: Any, done: float) -> Loss:
        """Compute the loss of a batch.

        Args:
            batch: what :meth:`batch` made.
            done: share of the steps taken, 0 to 1, for schedules.
        """

    def begin(self, folder: Path, part: int, parts: int) -> None:
        """Make what must be there before the first step, or find it in the folder of the run.

        Every process calls this, and waits for the others before the first step.

        Args:
            folder: of the run.
            part: which process this is, from 0; what takes long is shared among them.
            parts: number of processes.
        """
        del folder, part, parts

    def describe(self, batch: Any) -> str:
        """Name the examples of a batch, for messages; "" where nothing is known of them."""
        return ""

    def weight(self, batch: Any) -> float:
        """Say how much a batch counts beside the others of its step: what its loss is the mean of, such as tokens."""
        del batch
        return 1.0

    def matrices(self) -> list[nn.Parameter]:
        """Parameters that Muon may orthogonalise: those of two axes, embeddings and output layers left out."""
        embeddings = {id(part.weight) for part in self.modules() if isinstance(part, nn.Embedding)}
        for part in self.modules():
            output_of: Any = getattr(part, "get_output_embeddings", None)
            output = output_of() if output_of is not None else None
            embeddings |= {id(output.weight)} if isinstance(output, nn.Linear) else set()
        return [p for p in self.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in embeddings]

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """What is trained by AdamW, in parts, each with its learning rate as a share of that of the settings."""
        return [([p for p in self.parameters() if p.requires_grad], 1.0)]

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write what was learned, in the form in which it is used."""

    def evaluate(self, folder: Path) -> Mapping[str, float]:
        """Measure what was exported to a folder; the figures end up beside those of the last step."""
        del folder
        return {}


class BadExample(ValueError):
    """Data that cannot be trained on; the message names file and line."""
