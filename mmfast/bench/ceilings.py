"""What a machine can do at most, measured: everything else is held against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mmfast.bench.timing import Clock

_REPEATS = 10


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device.

    Attributes:
        copy: bytes per second, read and written, of copying a large tensor.
        matmul: floating point operations per second of multiplying two large square matrices.
    """

    copy: float
    matmul: float

    def prefill_seconds(self, macs: int) -> float:
        """Return the least time of a prefill: its multiply-accumulates, two operations each, at full speed.

        Example:
            >>> Ceilings(copy=1.0, matmul=4.0).prefill_seconds(8)
            4.0
        """
        return 2 * macs / self.matmul

    def decode_seconds(self, weight_bytes: int, kv_bytes: int) -> float:
        """Return the least time of a decode step, which reads all weights and the whole cache once.

        Example:
            >>> Ceilings(copy=4.0, matmul=1.0).decode_seconds(6, 2)
            2.0
        """
        return (weight_bytes + kv_bytes) / self.copy

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return vars(self).copy()


def measured_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the limits of a device; the fastest of several runs counts, after a warm-up.

    Args:
        device: where.
        dtype: of the matrices.

    Example:
        >>> measured_ceilings(torch.device("cpu"), torch.float32).copy > 0
        True
    """
    clock = Clock(device)
    size, side = (1 << 30, 8192) if clock.cuda else (1 << 26, 768)
    source, target = (torch.ones(size, dtype=torch.int8, device=device) for _ in range(2))
    left, right, product = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    copying = _fastest(clock, lambda: target.copy_(source))
    multiplying = _fastest(clock, lambda: torch.mm(left, right, out=product))
    return Ceilings(2 * size / copying, 2 * side**3 / multiplying)


def _fastest(clock: Clock, run: Callable[[], Any]) -> float:
    clock.sample(run)
    return min(clock.sample(run)[1] for _ in range(_REPEATS))
