"""Things timed side by side: in turn, warm-up left out, medians and quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_SHORTEST = 2e-3
"""Seconds that one sample takes at least on a CPU, whose clock is coarse; shorter things are run several times."""
_FLUSHES = 8
"""How often the cache is overwritten before a sample on a GPU: also long enough to hide a launch behind."""


class DeviceLostError(RuntimeError):
    """The device answers no more: what comes next has to run in another process."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles.

    Attributes:
        median: the median.
        low: first quartile.
        high: third quartile.
        repeats: how many values there were.
    """

    median: float
    low: float
    high: float
    repeats: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Describe at least one value.

        Example:
            >>> Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
            Spread(median=3.0, low=2.0, high=4.0, repeats=5)
        """
        if len(values) == 1:
            return Spread(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high, len(values))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return vars(self).copy()


class Clock:
    """Seconds that something costs: of the processor on a CPU, so that other work there does not count.

    Args:
        device: where it runs.

    Example:
        >>> Clock(torch.device("cpu")).cost(lambda: sum(range(1000))) > 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._device = device
        self._flush: torch.Tensor | None = None
        if self.cuda:
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    @property
    def unit(self) -> str:
        """What is counted."""
        return "seconds" if self.cuda else "processor seconds of one thread"

    def now(self) -> float:
        """Return a time after which everything that was asked for is done."""
        if self.cuda:
            torch.cuda.synchronize(self._device)
            return time.perf_counter()
        return time.process_time()

    def cost(self, run: Callable[[], Any]) -> float:
        """Run once; what the host needs to start it is included."""
        begin = self.now()
        run()
        return self.now() - begin

    def sample(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Time a short operation whose inputs are in no cache.

        Returns:
            Seconds with what the host needs to start it, and seconds of the device alone; on a CPU they are one.
        """
        if self._flush is None:
            first = self.cost(run)
            if first >= _SHORTEST:
                return first, first
            times = int(_SHORTEST / max(first, 1e-7)) + 1
            mean = self.cost(lambda: [run() for _ in range(times)]) / times
            return mean, mean
        self._flush.zero_()
        whole = self.cost(run)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_FLUSHES):
            self._flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return whole, begin.elapsed_time(end) / 1e3


def interleaved(
    sides: Mapping[str, Callable[[], T]], *, repeats: int, seconds: float, warm_ups: int = 1
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Run several things in turn: A, B, A, B, ...

    What raises during warm-up is left out with the reason, so that one that cannot run here spoils no other.

    Args:
        sides: name -> what to run; each returns its own measurement.
        repeats: counted rounds, fewer where they would take longer than ``seconds``, but at least one.
        seconds: most that the counted rounds should take.
        warm_ups: rounds that do not count.

    Returns:
        Name -> measurements, round by round; and name -> why it was left out.

    Raises:
        ValueError: if ``repeats`` or ``warm_ups`` is below 1.
        DeviceLostError: if the device answers no more.

    Example:
        >>> found, left_out = interleaved({"one": lambda: 1, "none": lambda: 1 // 0}, repeats=2, seconds=1.0)
        >>> found, left_out
        ({'one': [1, 1]}, {'none': 'ZeroDivisionError: integer division or modulo by zero'})
    """
    for name, value in (("repeats", repeats), ("warm_ups", warm_ups)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    left_out: dict[str, str] = {}
    round_seconds = 0.0
    for name, run in sides.items():
        try:
            for _ in range(warm_ups):
                begin = time.perf_counter()
                run()
            round_seconds += time.perf_counter() - begin
        except Exception as error:
            left_out[name] = explained(error)
    alive = {name: run for name, run in sides.items() if name not in left_out}
    rounds = max(1, min(repeats, int(seconds / max(round_seconds, 1e-9))))
    found: dict[str, list[T]] = {name: [] for name in alive}
    for _ in range(rounds):
        for name, run in alive.items():
            found[name].append(run())
    return found, left_out


def explained(error: Exception) -> str:
    """Name an error in one line; let go of what it held, and of the device if it is lost.

    Raises:
        DeviceLostError: if the device answers no more.
    """
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if torch.cuda.is_available():
        # The frames of the error hold tensors, which after a lack of memory are what is lacking.
        error.__traceback__ = None
        torch.cuda.empty_cache()
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            raise DeviceLostError(reason) from lost
    return reason


def ratios(baseline: Sequence[float], other: Sequence[float]) -> Spread:
    """Say how many times faster another is than a baseline, round by round: above 1 is faster.

    Ratios are taken within a round, so that they hold while the speed of the machine drifts.

    Example:
        >>> ratios([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]).median
        2.0
    """
    return Spread.of([one / two for one, two in zip(baseline, other, strict=True)])
