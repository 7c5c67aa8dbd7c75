"""A small training that several processes share: each runs this file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from mmfast.training.objective import Loss, Objective
from mmfast.training.settings import Settings
from mmfast.training.trainer import train


class Uneven(Objective):
    """Fit a line to six points a step, of which the first share has one and the last the most."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(2, 1)

    def batch(self, step: int, part: int, parts: int, size: int) -> Tensor:
        """Take the points of a share."""
        points = torch.randn(6, 2, generator=torch.Generator().manual_seed(step))
        return points[part:] if part + 1 == parts else points[part : part + 1]

    def forward(self, batch: Tensor, done: float) -> Loss:
        """Compute the mean over the points."""
        gap = self.net(batch).squeeze(-1) - batch @ torch.tensor([1.0, -2.0])
        return Loss(gap.square().mean())

    def weight(self, batch: Tensor) -> float:
        """Count the points."""
        return len(batch)

    def export(self, folder: Path) -> None:
        """Write nothing: checkpoints hold the weights."""


ACCUMULATED = (1, 2)


def settings(accumulate: int = 1) -> Settings:
    """Return settings under which a step depends on the size of the gradient."""
    return Settings(
        steps=4, batch=4, accumulate=accumulate, learning_rate=0.05, warmup=0, clip=0.0, clip_value=0.5, log_every=1
    )


def main(folder: str) -> None:
    """Train with one pass a step, and with several."""
    for accumulate in ACCUMULATED:
        train(Uneven(), settings(accumulate), Path(folder) / str(accumulate), progress=False)


if __name__ == "__main__":
    main(sys.argv[1])
