"""Operations with the inputs that benchmarks give them, and their results held against each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.bench.costs import Size
from mmfast.bench.operations import OPERATIONS, Draw

CLOSE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""dtype -> largest error, relative to the largest number of a result or to 1."""


def tensors(found: Any) -> list[Tensor]:
    """The parts of a result, those left out by None."""
    parts = found if isinstance(found, tuple | list) else (found,)
    return [part for part in parts if part is not None]


def near(found: Any, wanted: Any, dtype: torch.dtype) -> None:
    # The first parts are what the other form gives too: an output without its log-sum-exp, say.
    for mine, other in zip(tensors(found), tensors(wanted), strict=False):
        mine, other = mine.squeeze(), other.squeeze()
        assert mine.shape == other.shape
        if not mine.is_floating_point():
            assert torch.equal(mine, other)
            continue
        # In place and row by row: what is compared may be large.
        largest = max(1.0, float(other.abs().max()))
        assert bool(mine.isfinite().all())
        assert float((mine.float() - other.float()).abs().max()) <= CLOSE[dtype] * largest


def runs(name: str, size: Size, device: str, dtype: torch.dtype) -> dict[str, Any]:
    with torch.inference_mode():
        return OPERATIONS[name].sides(Draw(size, torch.device(device), dtype))
