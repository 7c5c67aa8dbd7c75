"""Slices of attention in Triton: one pass over the logits each, none of them stored."""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.attention_stats.problem import HIDES, Problem
from mmfast.kernels.dispatch import interpreted

_HIDES = tl.constexpr(HIDES)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

# Bytes of a padded head -> rows and columns of a tile, warps, stages of the pipeline. All of them fit the 99 KiB of
# shared memory that GPUs since compute capability 8.6 have at least.
TILES = {128: (64, 128, 4, 2), 256: (64, 64, 4, 2), 512: (64, 32, 8, 1), 1024: (32, 16, 4, 1)}
_FEWEST = 16
"""The matrix product takes no fewer rows, columns or channels."""
WAVES = 2
"""Programs per multiprocessor up to which one row or column is split among several."""


@triton.jit
def _states(start, alive, WIDTH: tl.constexpr, PADDED: tl.constexpr, WIDEN: tl.constexpr):
    """Load the states that ``start`` points at."""
    channel = tl.arange(0, PADDED)
    seen = alive[:, None] & (channel < WIDTH)[None, :]
    found = tl.load(start[:, None] + channel[None, :], mask=seen, other=0.0)
    # The interpreter has no matrix product of bfloat16.
    return found.to(tl.float32) if WIDEN else found


@triton.jit
def _packed_rows(
    places, program, group, batch, rows, columns, RATIO: tl.constexpr, PLACED: tl.constexpr, ROWS: tl.constexpr
):
    """Say which rows a program has: head, row, the column it stands in, and whether there is one.

    The rows of all query heads of a key head follow each other, so that one row of many heads is one tile.
    """
    packed = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = packed < rows * RATIO
    head = group * RATIO + packed // rows
    row = packed % rows
    place = row + (columns - rows)
    if PLACED:
        place = tl.load(places + batch * rows + row, mask=alive, other=0)
    return head, row, place, alive


@triton.jit
def _logits(
    query, key, place, column, seen, given, given_column, window, scaling, softcap, temperature,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Compute a tile of logits in units of log 2; ``given`` points at the mask of each row."""
    found = tl.dot(query, tl.trans(key), input_precision="ieee") * tl.full([], scaling, tl.float32)
    if CAPPED:
        cap = tl.full([], softcap, tl.float32)
        found = cap - 2.0 * cap / (tl.exp(2.0 * found / cap) + 1.0)
    if MASK != "none":
        own = tl.load(given[:, None] + column[None, :] * given_column, mask=seen, other=0)
        if MASK == "bool":
            seen = seen & (own != 0)
        else:
            own = own.to(tl.float32)
            seen = seen & (own > _HIDES)
            found += own
    if CAUSAL:
        seen = seen & (column[None, :] <= place[:, None])
    if WINDOWED:
        seen = seen & (column[None, :] > place[:, None] - window)
    return tl.where(seen, found * (_LOG2E / tl.full([], temperature, tl.float32)), -float("inf"))


@triton.jit
def _shares(logits, lse, alive):
    """Turn a tile of logits into probabilities; ``lse`` points at the log-sum-exp of each row."""
    level = tl.load(lse, mask=alive, other=0.0)
    # A row that sees nothing: exp(-inf - inf) is 0, where exp(-inf + inf) is not a number.
    level = tl.where(level == -float("inf"), float("inf"), level * _LOG2E)
    return tl.exp2(logits - level[:, None])


@triton.jit(do_not_specialize=["rows", "columns", "span", "window"])
def _rows_kernel(
    query, key, places, valid, mask, strides, rows, columns, window, scaling, softcap, temperature,
    value, value_strides, visual, lse, mass, read, span,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, PLACED: tl.constexpr, VALID: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    MASS: tl.constexpr, READ: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, mass and output of some rows over one span of columns."""
    (query_batch, query_head, query_row), (key_batch, key_head, key_row), mask_strides = strides
    mask_batch, mask_head, mask_row, mask_column = mask_strides
    value_batch, value_head, value_row = value_strides
    batch = tl.program_id(1).to(tl.int64) // GROUPS
    group = tl.program_id(1).to(tl.int64) % GROUPS
    split = tl.program_id(2).to(tl.int64)
    head, row, place, alive = _packed_rows(places, tl.program_id(0), group, batch, rows, columns, RATIO, PLACED, ROWS)
    own = query + batch * query_batch + head * query_head + row * query_row
    query_tile = _states(own, alive, WIDTH, PADDED, WIDEN)
    given = mask + batch * mask_batch + head * mask_head + row * mask_row

    low = split * span
    high = tl.minimum(low + span, columns)
    end = high
    if CAUSAL:
        end = tl.minimum(end, tl.max(tl.where(alive, place, -1)) + 1)
    if WINDOWED:
        low = tl.maximum(low, tl.min(tl.where(alive, place, columns)) - window + 1)

    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    seen_mass = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    for start in range(low, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS).to(tl.int64)
        exists = column < high
        if VALID:
            exists = exists & (tl.load(valid + batch * columns + column, mask=exists, other=0) != 0)
        key_start = key + batch * key_batch + group * key_head + column * key_row
        found = _logits(
            query_tile, _states(key_start, exists, WIDTH, PADDED, WIDEN), place, column,
            alive[:, None] & exists[None, :], given, mask_column, window, scaling, softcap, temperature,
            MASK, CAUSAL, WINDOWED, CAPPED,
        )  # fmt: skip
        larger = tl.maximum(largest, tl.max(found, axis=1))
        # As long as a row has seen nothing its maximum cannot be subtracted.
        level = tl.where(larger == -float("inf"), 0.0, larger)
        share = tl.exp2(found - level[:, None])
        fade = tl.exp2(largest - level)
        total = total * fade + tl.sum(share, axis=1)
        if MASS:
            counted = tl.load(visual + batch * columns + column, mask=exists, other=0) != 0
            seen_mass = seen_mass * fade + tl.sum(tl.where(counted[None, :], share, 0.0), axis=1)
        if READ:
            value_start = value + batch * value_batch + group * value_head + column * value_row
            value_tile = _states(value_start, exists, VALUE_WIDTH, VALUE_PADDED, WIDEN)
            output = output * fade[:, None]
            output += tl.dot(share.to(value_tile.dtype), value_tile, input_precision="ieee")
        largest = larger

    some = tl.where(total > 0.0, total, 1.0)
    at = ((split * tl.num_programs(1) // GROUPS + batch) * GROUPS * RATIO + head) * rows + row
    tl.store(lse + at, tl.where(total > 0.0, (largest + tl.log2(some)) * _LN2, -float("inf")), mask=alive)
    if MASS:
        tl.store(mass + at, seen_mass / some, mask=alive)
    if READ:
        channel = tl.arange(0, VALUE_PADDED)
        stored = alive[:, None] & (channel < VALUE_WIDTH)[None, :]
        output = output / some[:, None]
        tl.store(read + at[:, None] * VALUE_WIDTH + channel[None, :], output, mask=stored)


@triton.jit(do_not_specialize=["rows", "columns", "first", "window"])
def _probabilities_kernel(
    query, key, places, valid, mask, strides, rows, columns, window, scaling, softcap, temperature,
    lse, found, first,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    PLACED: tl.constexpr, VALID: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write a tile of probabilities."""
    (query_batch, query_head, query_row), (key_batch, key_head, key_row), mask_strides = strides
    mask_batch, mask_head, mask_row, mask_column = mask_strides
    batch = tl.program_id(2).to(tl.int64) // GROUPS
    group = tl.program_id(2).to(tl.int64) % GROUPS
    head, row, place, alive = _packed_rows(places, tl.program_id(1), group, batch, rows, columns, RATIO, PLACED, ROWS)
    column = first + tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < columns
    stored = alive[:, None] & exists[None, :]
    if VALID:
        exists = exists & (tl.load(valid + batch * columns + column, mask=exists, other=0) != 0)
    own = query + batch * query_batch + head * query_head + row * query_row
    key_start = key + batch * key_batch + group * key_head + column * key_row
    logits = _logits(
        _states(own, alive, WIDTH, PADDED, WIDEN), _states(key_start, exists, WIDTH, PADDED, WIDEN), place, column,
        alive[:, None] & exists[None, :], mask + batch * mask_batch + head * mask_head + row * mask_row, mask_column,
        window, scaling, softcap, temperature, MASK, CAUSAL, WINDOWED, CAPPED,
    )  # fmt: skip
    at = (batch * GROUPS * RATIO + head) * rows + row
    target = found + at[:, None] * (columns - first) + (column - first)[None, :]
    tl.store(target, _shares(logits, lse + at, alive), mask=stored)


@triton.jit(do_not_specialize=["rows", "columns", "first", "span", "window"])
def _columns_kernel(
    query, key, places, valid, mask, strides, rows, columns, window, scaling, softcap, temperature,
    lse, weights, weights_strides, found, first, span,
    HEADS: tl.constexpr, INNER: tl.constexpr, RATIO: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    PLACED: tl.constexpr, VALID: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, LARGEST_HEAD: tl.constexpr, LARGEST_ROW: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Reduce one span of rows for some columns: over INNER heads in the tile, then over the rows."""
    (query_batch, query_head, query_row), (key_batch, key_head, key_row), mask_strides = strides
    mask_batch, mask_head, mask_row, mask_column = mask_strides
    weights_batch, weights_head, weights_row = weights_strides
    outer = tl.program_id(2).to(tl.int64)
    batch = outer // (HEADS // INNER)
    leading = outer % (HEADS // INNER) * INNER
    split = tl.program_id(1).to(tl.int64)
    begin = first + tl.program_id(0).to(tl.int64) * COLUMNS
    column = begin + tl.arange(0, COLUMNS)
    stored = column < columns
    exists = stored
    if VALID:
        exists = exists & (tl.load(valid + batch * columns + column, mask=stored, other=0) != 0)
    key_start = key + batch * key_batch + column * key_row
    # With one head the keys stay where they are for all rows.
    key_tile = _states(key_start + leading // RATIO * key_head, exists, WIDTH, PADDED, WIDEN)

    low = split * span
    high = tl.minimum(low + span, rows)
    end = high
    if not PLACED:
        if CAUSAL:
            low = tl.maximum(low, begin - (columns - rows))
        if WINDOWED:
            end = tl.minimum(end, begin + COLUMNS - 1 + window - (columns - rows))

    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(low, end, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        alive = row < high
        weight = weights + batch * weights_batch + leading * weights_head + row * weights_row
        weight = tl.load(weight, mask=alive, other=0.0).to(tl.float32)
        # Most methods weigh a few rows of a long prompt.
        if tl.max(tl.abs(weight)) > 0.0:
            place = row + (columns - rows)
            if PLACED:
                place = tl.load(places + batch * rows + row, mask=alive, other=0)
            reduced = tl.zeros([ROWS, COLUMNS], tl.float32)
            for inner in range(INNER):
                head = leading + inner
                if INNER > 1 and inner % RATIO == 0:
                    key_tile = _states(key_start + head // RATIO * key_head, exists, WIDTH, PADDED, WIDEN)
                own = query + batch * query_batch + head * query_head + row * query_row
                logits = _logits(
                    _states(own, alive, WIDTH, PADDED, WIDEN), key_tile, place, column,
                    alive[:, None] & exists[None, :],
                    mask + batch * mask_batch + head * mask_head + row * mask_row, mask_column,
                    window, scaling, softcap, temperature, MASK, CAUSAL, WINDOWED, CAPPED,
                )  # fmt: skip
                share = _shares(logits, lse + (batch * HEADS + head) * rows + row, alive)
                if LARGEST_HEAD:
                    reduced = tl.maximum(reduced, share)
                else:
                    reduced += share / INNER
            weighed = reduced * weight[:, None]
            if LARGEST_ROW:
                total = tl.maximum(total, tl.max(weighed, axis=0))
            else:
                total += tl.sum(weighed, axis=0)
    at = (split * tl.num_programs(2) + outer) * (columns - first) + (column - first)
    tl.store(found + at, total, mask=stored)


def rows(problem: Problem, value: Tensor | None, visual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute log-sum-exps ``[B, H, R]``, the mass of ``visual`` (or nothing of use) and what is read."""
    batch, heads, count, columns = problem.sizes
    groups = int(problem.key.shape[1])
    shared, tile_rows, tile_columns, launch = _shared(problem, heads // groups * count)
    tiles = triton.cdiv(heads // groups * count, tile_rows)
    splits = _splits(problem.query, tiles * batch * groups, triton.cdiv(columns, tile_columns))
    span = triton.cdiv(triton.cdiv(columns, splits), tile_columns) * tile_columns
    splits = triton.cdiv(columns, span)
    device = problem.query.device
    lse = torch.empty((splits, batch, heads, count), dtype=torch.float32, device=device)
    mass = lse if visual is None else torch.empty_like(lse)
    value = None if value is None else _last_contiguous(value)
    width = 1 if value is None else int(value.shape[-1])
    # Partial outputs are put together in float32.
    dtype = problem.query.dtype if splits == 1 else torch.float32
    read = None if value is None else torch.empty((*lse.shape, width), dtype=dtype, device=device)
    with torch.cuda.device_of(problem.query):
        _rows_kernel[(tiles, batch * groups, splits)](
            **shared,
            value=problem.key if value is None else value,
            value_strides=(0, 0, 0) if value is None else value.stride()[:3],
            visual=_bytes(visual, problem.query),
            lse=lse,
            mass=mass,
            read=lse if read is None else read,
            span=span,
            GROUPS=groups,
            RATIO=heads // groups,
            VALUE_WIDTH=width,
            VALUE_PADDED=_FEWEST if value is None else _padded(width),
            MASS=visual is not None,
            READ=value is not None,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            **launch,
        )
    if splits == 1:
        return lse[0], mass[0], None if read is None else read[0]
    whole = lse.logsumexp(dim=0)
    share = torch.where(lse == -torch.inf, 0.0, (lse - whole).exp())
    mass = (mass * share).sum(dim=0) if visual is not None else whole
    if read is not None:
        read = (read * share[..., None]).sum(dim=0).to(problem.query.dtype)
    return whole, mass, read


def probabilities(problem: Problem, lse: Tensor | None, first: int) -> Tensor:
    """Compute all rows of probabilities, ``[B, H, R, m - first]``."""
    batch, heads, count, columns = problem.sizes
    if lse is None:
        lse = rows(problem, None, None)[0]
    groups = int(problem.key.shape[1])
    shared, tile_rows, tile_columns, launch = _shared(problem, heads // groups * count)
    found = torch.empty((batch, heads, count, columns - first), dtype=torch.float32, device=problem.query.device)
    grid = (
        triton.cdiv(columns - first, tile_columns),
        triton.cdiv(heads // groups * count, tile_rows),
        batch * groups,
    )
    if found.numel():
        with torch.cuda.device_of(problem.query):
            _probabilities_kernel[grid](
                **shared,
                lse=lse.contiguous(),
                found=found,
                first=first,
                GROUPS=groups,
                RATIO=heads // groups,
                ROWS=tile_rows,
                COLUMNS=tile_columns,
                **launch,
            )
    return found


def column_sums(
    problem: Problem,
    lse: Tensor | None,
    weights: Tensor,
    heads: Literal["none", "mean", "max"],
    over: Literal["sum", "max"],
    first: int,
) -> Tensor:
    """Reduce the rows; see the public function."""
    # Weights that say yes or no are numbers here.
    weights = weights if weights.is_floating_point() else weights.float()
    batch, count, length, columns = problem.sizes
    if lse is None:
        lse = rows(problem, None, None)[0]
    shared, tile_rows, tile_columns, launch = _shared(problem, length)
    # Sums of sums commute: only what does not has all heads in one tile.
    inside = heads == "max" or (heads == "mean" and over == "max")
    inner = count if inside else 1
    tiles = triton.cdiv(columns - first, tile_columns)
    splits = _splits(problem.query, tiles * batch * (count // inner), triton.cdiv(length, tile_rows))
    span = triton.cdiv(triton.cdiv(length, splits), tile_rows) * tile_rows
    splits = triton.cdiv(length, span)
    found = torch.empty((splits, batch, count // inner, columns - first), dtype=torch.float32, device=lse.device)
    if not found.numel():
        return found[0, :, 0] if heads != "none" else found[0]
    with torch.cuda.device_of(problem.query):
        _columns_kernel[(tiles, splits, batch * (count // inner))](
            **shared,
            lse=lse.contiguous(),
            weights=weights,
            weights_strides=(weights.stride(0), weights.stride(1) if weights.ndim == 3 else 0, weights.stride(-1)),
            found=found,
            first=first,
            span=span,
            HEADS=count,
            INNER=inner,
            RATIO=count // int(problem.key.shape[1]),
            LARGEST_HEAD=heads == "max",
            LARGEST_ROW=over == "max",
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            **launch,
        )
    total = found.amax(dim=0) if over == "max" else found.sum(dim=0)
    if heads == "none":
        return total
    return total[:, 0] if inside else total.mean(dim=1)


def _shared(problem: Problem, length: int) -> tuple[dict[str, Any], int, int, dict[str, int]]:
    """Return the arguments all kernels take, and the tile and launch options for ``length`` rows."""
    query, key = _last_contiguous(problem.query), _last_contiguous(problem.key)
    width = int(query.shape[-1])
    padded = _padded(width)
    tile_rows, tile_columns, warps, stages = TILES[max(128, padded * query.element_size())]
    tile_rows = min(tile_rows, max(_FEWEST, triton.next_power_of_2(length)))
    mask = problem.mask
    _, _, count, columns = problem.sizes
    given = {
        "query": query,
        "key": key,
        "places": query if problem.places is None else problem.places.contiguous(),
        "valid": _bytes(problem.valid, query),
        "mask": query if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        "strides": (query.stride()[:3], key.stride()[:3], (0, 0, 0, 0) if mask is None else mask.stride()),
        "rows": count,
        "columns": columns,
        "window": problem.window or 0,
        "scaling": problem.scaling,
        "softcap": problem.softcap or 1.0,
        "temperature": problem.temperature,
        "WIDTH": width,
        "PADDED": padded,
        "PLACED": problem.places is not None,
        "VALID": problem.valid is not None,
        "MASK": "none" if mask is None else "bool" if mask.dtype == torch.bool else "added",
        "CAUSAL": problem.causal,
        "WINDOWED": problem.window is not None,
        "CAPPED": problem.softcap is not None,
        "WIDEN": query.dtype == torch.bfloat16 and interpreted(),
    }
    return given, tile_rows, tile_columns, {"num_warps": warps, "num_stages": stages}


def _splits(tensor: Tensor, programs: int, most: int) -> int:
    """Say into how many parts to split the work of ``programs``, so that no multiprocessor is idle."""
    if not tensor.is_cuda:
        return 1
    wanted = WAVES * torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return max(1, min(wanted // max(1, programs), most))


def _padded(width: int) -> int:
    return max(_FEWEST, int(triton.next_power_of_2(width)))


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _bytes(given: Tensor | None, instead: Tensor) -> Tensor:
    """Return bool as bytes, which kernels can point at; something to point at where there is none."""
    return instead if given is None else given.contiguous().view(torch.uint8)
