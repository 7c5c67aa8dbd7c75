"""One operation at one size: both forms and what else does the same, in turn, against the ceilings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mmfast.bench.ceilings import Ceilings
from mmfast.bench.costs import COSTS, Size
from mmfast.bench.operations import OPERATIONS, Draw
from mmfast.bench.timing import Clock, Spread, interleaved, ratios

_WARM_UPS = 2
"""The first launch compiles, the second finds everything in place."""

SIZES: dict[str, tuple[Size, ...]] = {
    "real": (
        Size("LLaVA-NeXT-Video-7B", 1, 12544, 640, 32, 32, 128, 4096),
        Size("LLaVA-1.5-7B", 1, 576, 64, 32, 32, 128, 4096),
        Size("LLaVA-NeXT-7B", 1, 2880, 160, 32, 32, 128, 4096),
        Size("LLaVA-OneVision-7B", 1, 12544, 640, 28, 4, 128, 3584),
        Size("LLaVA-OneVision-0.5B", 1, 12544, 640, 14, 2, 64, 896),
    ),
    "small": (Size("576 tokens", 1, 576, 64, 8, 4, 64, 1024),),
    "tiny": (Size("64 tokens", 1, 64, 8, 4, 2, 32, 48),),
}
"""Scale -> the shapes operations are measured at, for a batch of one."""

BATCHES: dict[str, tuple[int, ...]] = {"real": (1, 8, 32), "small": (1, 4), "tiny": (1, 2)}
"""Scale -> sizes of batches, of operations and of models."""


def kernel_sizes(scale: str, operation: str, dtype: torch.dtype) -> list[Size]:
    """List the sizes an operation is measured at.

    An operation on features is measured once for each number of tokens and width, whatever the heads are.

    Args:
        scale: ``"real"``, ``"small"`` or ``"tiny"``.
        operation: its name.
        dtype: of floating numbers.

    Example:
        >>> [size.batch for size in kernel_sizes("tiny", "compact", torch.float32)]
        [1, 2]
    """
    found, seen = [], set()
    for size in SIZES[scale]:
        key = (size.tokens, size.width) if OPERATIONS[operation].on_features else size
        if key not in seen:
            seen.add(key)
            found += [replace(size, batch=batch, item=dtype.itemsize) for batch in BATCHES[scale]]
    return found


def kernel_cell(
    name: str, size: Size, *, device: torch.device, dtype: torch.dtype, ceilings: Ceilings, repeats: int, seconds: float
) -> dict[str, Any]:
    """Measure one operation at one size.

    Args:
        name: of the operation.
        size: the size.
        device: where.
        dtype: of floating numbers.
        ceilings: what the device can do.
        repeats: counted rounds.
        seconds: most that they should take.

    Returns:
        Plain values. For each form its seconds (with what the host needs to start it, and of the device alone), bytes
        and operations per second of the device and their shares of the ceilings, and how many times faster it is than
        the baseline, round by round; and what could not run, with the reason.
    """
    operation, cost, clock = OPERATIONS[name], COSTS[name], Clock(device)
    moved, flops = cost.moved(size), cost.flops(size)

    with torch.inference_mode():
        sides = operation.sides(Draw(size, device, dtype))
        # One at a time needs no more memory than its own.
        timed = {side: lambda run=run: clock.sample(run) for side, run in sides.items()}
        found, left_out = interleaved(timed, repeats=repeats, seconds=seconds, warm_ups=_WARM_UPS)
    result: dict[str, Any] = {
        "operation": name,
        "size": vars(size).copy(),
        "dtype": str(dtype).removeprefix("torch."),
        "baseline": operation.baseline,
        "bytes": moved,
        "flops": flops,
        "sides": {},
        "left_out": left_out,
    }
    base = [whole for whole, _ in found.get(operation.baseline, [])]
    for side, samples in found.items():
        whole, alone = ([sample[part] for sample in samples] for part in (0, 1))
        middle = Spread.of(alone).median
        row = {
            "seconds": Spread.of(whole).to_dict(),
            "device_seconds": Spread.of(alone).to_dict(),
            "bytes_per_second": moved / middle,
            "flops_per_second": flops / middle,
            "share_of_copy": moved / middle / ceilings.copy,
            "share_of_matmul": flops / middle / ceilings.matmul,
        }
        if base:
            faster = ratios(base, whole)
            row |= {"faster": faster.to_dict(), "slower": faster.median < 1.0}
        result["sides"][side] = row
    return result
