"""Pieces of kernels over the logits: tiles of states, what rows reach, logits, probabilities, and how to launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.attention_stats.problem import HIDES, Problem
from mmfast.kernels.dispatch import interpreted

_HIDES = tl.constexpr(HIDES)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Bytes of a padded head -> rows and columns of a tile, warps, stages of the pipeline. All of them fit the 99 KiB of
# shared memory that GPUs since compute capability 8.6 have at least.
TILES = {128: (64, 128, 4, 2), 256: (64, 64, 4, 2), 512: (64, 32, 8, 1), 1024: (32, 16, 4, 1)}
FEWEST = 16
"""The matrix product takes no fewer rows, columns or channels."""
WAVES = 2
"""Programs per multiprocessor up to which one row or column is split among several."""


@triton.jit
def states(start, alive, WIDTH: tl.constexpr, PADDED: tl.constexpr, WIDEN: tl.constexpr):
    """Load the states that ``start`` points at."""
    channel = tl.arange(0, PADDED)
    seen = alive[:, None] & (channel < WIDTH)[None, :]
    found = tl.load(start[:, None] + channel[None, :], mask=seen, other=0.0)
    # The interpreter has no matrix product of bfloat16.
    return found.to(tl.float32) if WIDEN else found


@triton.jit
def packed_rows(program, group, rows, RATIO: tl.constexpr, ROWS: tl.constexpr):
    """Say which rows a program has: head, row, and whether there is one.

    The rows of all query heads of a key head follow each other, so that one row of many heads is one tile.
    """
    place = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return group * RATIO + place // rows, place % rows, place < rows * RATIO


@triton.jit
def reach(
    spans, batch, row, alive, rows, columns, window,
    PLACED: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Say from which column to before which each row sees: nothing where there is no row."""
    places, begins, ends = spans
    at = batch * rows + row
    low = tl.where(alive, 0, columns).to(tl.int32)
    high = tl.where(alive, columns, 0).to(tl.int32)
    if CAUSAL or WINDOWED:
        place = row + (columns - rows)
        if PLACED:
            place = tl.load(places + at, mask=alive, other=0)
        place = place.to(tl.int32)
        if CAUSAL:
            high = tl.minimum(high, place + 1)
        if WINDOWED:
            low = tl.maximum(low, place - window + 1)
    if PACKED:
        low = tl.maximum(low, tl.load(begins + at, mask=alive, other=0).to(tl.int32))
        high = tl.minimum(high, tl.load(ends + at, mask=alive, other=0).to(tl.int32))
    return low, high


@triton.jit
def logits_of(
    query, key, low, high, column, seen, given, given_column, scaling, softcap, temperature,
    MASK: tl.constexpr, BOUNDED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Compute a tile of logits in units of log 2, and how they change with the products.

    ``given`` points at the mask of each row.
    """
    found = tl.dot(query, tl.trans(key), input_precision="ieee") * tl.full([], scaling, tl.float32)
    slope = tl.full([], scaling, tl.float32) / tl.full([], temperature, tl.float32)
    if CAPPED:
        cap = tl.full([], softcap, tl.float32)
        share = 1.0 - 2.0 / (tl.exp(2.0 * found / cap) + 1.0)
        found = cap * share
        slope = slope * (1.0 - share * share)
    else:
        slope = tl.zeros_like(found) + slope
    if MASK != "none":
        own = tl.load(given[:, None] + column[None, :] * given_column, mask=seen, other=0)
        if MASK == "bool":
            seen = seen & (own != 0)
        else:
            own = own.to(tl.float32)
            seen = seen & (own > _HIDES)
            found += own
    if BOUNDED:
        near = column.to(tl.int32)
        seen = seen & (near[None, :] >= low[:, None]) & (near[None, :] < high[:, None])
    return tl.where(seen, found * (LOG2E / tl.full([], temperature, tl.float32)), -float("inf")), slope


@triton.jit
def shares_of(logits, lse, alive):
    """Turn a tile of logits into probabilities; ``lse`` points at the log-sum-exp of each row."""
    level = tl.load(lse, mask=alive, other=0.0)
    # A row that sees nothing: exp(-inf - inf) is 0, where exp(-inf + inf) is not a number.
    level = tl.where(level == -float("inf"), float("inf"), level * LOG2E)
    return tl.exp2(logits - level[:, None])


def arguments(problem: Problem) -> dict[str, Any]:
    """Return what all kernels take, and how they are compiled for it."""
    query, key = last_contiguous(problem.query), last_contiguous(problem.key)
    width = int(query.shape[-1])
    mask = problem.whole_mask
    _, _, count, columns = problem.sizes
    placed, packed = problem.places is not None, problem.begins is not None
    spans = (problem.places, problem.begins, problem.ends)
    return {
        "query": query,
        "key": key,
        "spans": tuple(query if given is None else given.contiguous() for given in spans),
        "valid": as_bytes(problem.valid, query),
        "mask": query if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        "strides": (query.stride()[:3], key.stride()[:3], (0, 0, 0, 0) if mask is None else mask.stride()),
        "rows": count,
        "columns": columns,
        "window": problem.window or 0,
        "scaling": problem.scaling,
        "softcap": problem.softcap or 1.0,
        "temperature": problem.temperature,
        "WIDTH": width,
        "PADDED": padded(width),
        "PLACED": placed,
        "PACKED": packed,
        "VALID": problem.valid is not None,
        "MASK": "none" if mask is None else "bool" if mask.dtype == torch.bool else "added",
        "CAUSAL": problem.causal,
        "WINDOWED": problem.window is not None,
        "CAPPED": problem.softcap is not None,
        "WIDEN": query.dtype == torch.bfloat16 and interpreted(),
    }


def tile(sizes: dict[int, tuple[int, int, int, int]], problem: Problem, length: int, width: int = 1) -> dict[str, int]:
    """Return rows and columns of a tile and how a kernel is launched.

    Args:
        sizes: bytes of a padded head -> rows, columns, warps, stages.
        problem: what is computed.
        length: how many rows there are.
        width: channels of values, if any.
    """
    channels = max(padded(int(problem.query.shape[-1])), padded(width))
    rows, columns, warps, stages = sizes[max(128, channels * problem.query.element_size())]
    rows = min(rows, max(FEWEST, triton.next_power_of_2(length)))
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps, "num_stages": stages}


def padded(width: int) -> int:
    """Return how many channels a tile has."""
    return max(FEWEST, int(triton.next_power_of_2(width)))


def last_contiguous(tensor: Tensor) -> Tensor:
    """Return a tensor whose last axis lies side by side in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def as_bytes(given: Tensor | None, instead: Tensor) -> Tensor:
    """Return bool as bytes, which kernels can point at; something to point at where there is none."""
    return instead if given is None else given.contiguous().view(torch.uint8)


def weight_strides(weights: Tensor) -> tuple[int, int, int]:
    """Return how far it is to the weight of the next prompt, head and row."""
    return weights.stride(0), weights.stride(1) if weights.ndim == 3 else 0, weights.stride(-1)
