"""Slices of attention in Triton: one pass over the logits each, none of them stored."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.attention_stats import tiles
from mmfast.kernels.attention_stats.problem import Problem
from mmfast.kernels.attention_stats.tiles import (
    FEWEST,
    LN2,
    WAVES,
    arguments,
    as_bytes,
    last_contiguous,
    logits_of,
    packed_rows,
    padded,
    reach,
    shares_of,
    states,
    tile,
    weight_strides,
)


@triton.jit(do_not_specialize=["rows", "columns", "span", "window"])
def _rows_kernel(
    query, key, spans, valid, mask, strides, rows, columns, window, scaling, softcap, temperature,
    value, value_strides, visual, weights, weights_strides, lse, mass, read, span,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, PLACED: tl.constexpr, PACKED: tl.constexpr,
    VALID: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    MASS: tl.constexpr, READ: tl.constexpr, USED: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, mass and output of some rows over one span of columns."""
    (query_batch, query_head, query_row), (key_batch, key_head, key_row), mask_strides = strides
    mask_batch, mask_head, mask_row, mask_column = mask_strides
    value_batch, value_head, value_row = value_strides
    batch = tl.program_id(1).to(tl.int64) // GROUPS
    group = tl.program_id(1).to(tl.int64) % GROUPS
    split = tl.program_id(2).to(tl.int64)
    head, row, alive = packed_rows(tl.program_id(0), group, rows, RATIO, ROWS)
    near, far = reach(spans, batch, row, alive, rows, columns, window, PLACED, PACKED, CAUSAL, WINDOWED)
    own = query + batch * query_batch + head * query_head + row * query_row
    query_tile = states(own, alive, WIDTH, PADDED, WIDEN)
    given = mask + batch * mask_batch + head * mask_head + row * mask_row

    low = split * span
    high = tl.minimum(low + span, columns)
    end = high
    if USED:
        weight = weights + batch * weights_strides[0] + head * weights_strides[1] + row * weights_strides[2]
        # What weighs nothing is asked by nobody.
        if tl.max(tl.abs(tl.load(weight, mask=alive, other=0.0).to(tl.float32))) == 0.0:
            end = low
    end = tl.minimum(end, tl.max(far))
    low = tl.maximum(low, tl.min(near))

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
        found, _ = logits_of(
            query_tile, states(key_start, exists, WIDTH, PADDED, WIDEN), near, far, column,
            alive[:, None] & exists[None, :], given, mask_column, scaling, softcap, temperature,
            MASK, CAUSAL or WINDOWED or PACKED, CAPPED,
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
            value_tile = states(value_start, exists, VALUE_WIDTH, VALUE_PADDED, WIDEN)
            output = output * fade[:, None]
            output += tl.dot(share.to(value_tile.dtype), value_tile, input_precision="ieee")
        largest = larger

    some = tl.where(total > 0.0, total, 1.0)
    at = ((split * tl.num_programs(1) // GROUPS + batch) * GROUPS * RATIO + head) * rows + row
    tl.store(lse + at, tl.where(total > 0.0, (largest + tl.log2(some)) * LN2, -float("inf")), mask=alive)
    if MASS:
        tl.store(mass + at, seen_mass / some, mask=alive)
    if READ:
        channel = tl.arange(0, VALUE_PADDED)
        stored = alive[:, None] & (channel < VALUE_WIDTH)[None, :]
        output = output / some[:, None]
        tl.store(read + at[:, None] * VALUE_WIDTH + channel[None, :], output, mask=stored)


@triton.jit(do_not_specialize=["rows", "columns", "first", "window"])
def _probabilities_kernel(
    query, key, spans, valid, mask, strides, rows, columns, window, scaling, softcap, temperature,
    lse, found, first,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    PLACED: tl.constexpr, PACKED: tl.constexpr, VALID: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write a tile of probabilities."""
    (query_batch, query_head, query_row), (key_batch, key_head, key_row), mask_strides = strides
    mask_batch, mask_head, mask_row, mask_column = mask_strides
    batch = tl.program_id(2).to(tl.int64) // GROUPS
    group = tl.program_id(2).to(tl.int64) % GROUPS
    head, row, alive = packed_rows(tl.program_id(1), group, rows, RATIO, ROWS)
    near, far = reach(spans, batch, row, alive, rows, columns, window, PLACED, PACKED, CAUSAL, WINDOWED)
    column = first + tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < columns
    stored = alive[:, None] & exists[None, :]
    if VALID:
        exists = exists & (tl.load(valid + batch * columns + column, mask=exists, other=0) != 0)
    own = query + batch * query_batch + head * query_head + row * query_row
    key_start = key + batch * key_batch + group * key_head + column * key_row
    logits, _ = logits_of(
        states(own, alive, WIDTH, PADDED, WIDEN), states(key_start, exists, WIDTH, PADDED, WIDEN), near, far, column,
        alive[:, None] & exists[None, :], mask + batch * mask_batch + head * mask_head + row * mask_row, mask_column,
        scaling, softcap, temperature, MASK, CAUSAL or WINDOWED or PACKED, CAPPED,
    )  # fmt: skip
    at = (batch * GROUPS * RATIO + head) * rows + row
    target = found + at[:, None] * (columns - first) + (column - first)[None, :]
    tl.store(target, shares_of(logits, lse + at, alive), mask=stored)


@triton.jit(do_not_specialize=["rows", "columns", "first", "span", "window"])
def _columns_kernel(
    query, key, spans, valid, mask, strides, rows, columns, window, scaling, softcap, temperature,
    lse, weights, weights_strides, found, winners, first, span,
    HEADS: tl.constexpr, INNER: tl.constexpr, RATIO: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    PLACED: tl.constexpr, PACKED: tl.constexpr, VALID: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, LARGEST_HEAD: tl.constexpr, LARGEST_ROW: tl.constexpr,
    NAMED: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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
    key_tile = states(key_start + leading // RATIO * key_head, exists, WIDTH, PADDED, WIDEN)

    low = split * span
    high = tl.minimum(low + span, rows)
    end = high
    if not PLACED:
        # Rows before and behind these do not reach the tile.
        if CAUSAL:
            low = tl.maximum(low, begin - (columns - rows))
        if WINDOWED:
            end = tl.minimum(end, begin + COLUMNS - 1 + window - (columns - rows))

    total = tl.zeros([COLUMNS], tl.float32)
    winner = tl.full([COLUMNS], -1, tl.int32)
    for start in range(low, end, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        alive = row < high
        weight = weights + batch * weights_batch + leading * weights_head + row * weights_row
        weight = tl.load(weight, mask=alive, other=0.0).to(tl.float32)
        near, far = reach(spans, batch, row, alive, rows, columns, window, PLACED, PACKED, CAUSAL, WINDOWED)
        # Most methods weigh a few rows of a long prompt, and packed prompts do not see each other.
        touched = (tl.max(far) > begin) & (tl.min(near) < begin + COLUMNS)
        if (tl.max(tl.abs(weight)) > 0.0) & touched:
            reduced = tl.zeros([ROWS, COLUMNS], tl.float32)
            for inner in range(INNER):
                head = leading + inner
                if INNER > 1 and inner % RATIO == 0:
                    key_tile = states(key_start + head // RATIO * key_head, exists, WIDTH, PADDED, WIDEN)
                own = query + batch * query_batch + head * query_head + row * query_row
                logits, _ = logits_of(
                    states(own, alive, WIDTH, PADDED, WIDEN), key_tile, near, far, column,
                    alive[:, None] & exists[None, :],
                    mask + batch * mask_batch + head * mask_head + row * mask_row, mask_column,
                    scaling, softcap, temperature, MASK, CAUSAL or WINDOWED or PACKED, CAPPED,
                )  # fmt: skip
                share = shares_of(logits, lse + (batch * HEADS + head) * rows + row, alive)
                if LARGEST_HEAD:
                    reduced = tl.maximum(reduced, share)
                else:
                    reduced += share / INNER
            weighed = reduced * weight[:, None]
            if LARGEST_ROW:
                top = tl.max(weighed, axis=0)
                if NAMED:
                    named = tl.where(weighed == top[None, :], row[:, None].to(tl.int32), rows)
                    winner = tl.where(top > total, tl.min(named, axis=0), winner)
                total = tl.maximum(total, top)
            else:
                total += tl.sum(weighed, axis=0)
    at = (split * tl.num_programs(2) + outer) * (columns - first) + (column - first)
    tl.store(found + at, total, mask=stored)
    if NAMED:
        tl.store(winners + at, winner, mask=stored)


@triton.jit(do_not_specialize=["rows", "columns", "first", "window"])
def _winners_kernel(
    query, key, spans, valid, mask, strides, rows, columns, window, scaling, softcap, temperature,
    lse, found, first,
    HEADS: tl.constexpr, RATIO: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, PLACED: tl.constexpr,
    PACKED: tl.constexpr, VALID: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Say of a tile of entries which head has the largest; of equal ones the first."""
    (query_batch, query_head, query_row), (key_batch, key_head, key_row), mask_strides = strides
    mask_batch, mask_head, mask_row, mask_column = mask_strides
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    column = first + tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < columns
    stored = alive[:, None] & exists[None, :]
    if VALID:
        exists = exists & (tl.load(valid + batch * columns + column, mask=exists, other=0) != 0)
    near, far = reach(spans, batch, row, alive, rows, columns, window, PLACED, PACKED, CAUSAL, WINDOWED)
    key_start = key + batch * key_batch + column * key_row
    key_tile = states(key_start, exists, WIDTH, PADDED, WIDEN)
    largest = tl.full([ROWS, COLUMNS], -1.0, tl.float32)
    winner = tl.zeros([ROWS, COLUMNS], tl.int16)
    for head in range(HEADS):
        if head % RATIO == 0:
            key_tile = states(key_start + tl.cast(head // RATIO, tl.int64) * key_head, exists, WIDTH, PADDED, WIDEN)
        own = query + batch * query_batch + tl.cast(head, tl.int64) * query_head + row * query_row
        logits, _ = logits_of(
            states(own, alive, WIDTH, PADDED, WIDEN), key_tile, near, far, column,
            alive[:, None] & exists[None, :],
            mask + batch * mask_batch + tl.cast(head, tl.int64) * mask_head + row * mask_row, mask_column,
            scaling, softcap, temperature, MASK, CAUSAL or WINDOWED or PACKED, CAPPED,
        )  # fmt: skip
        share = shares_of(logits, lse + (batch * HEADS + head) * rows + row, alive)
        winner = tl.where(share > largest, tl.cast(head, tl.int16), winner)
        largest = tl.maximum(largest, share)
    target = found + ((batch * rows + row) * (columns - first))[:, None] + (column - first)[None, :]
    tl.store(target, winner, mask=stored)


def rows(
    problem: Problem, value: Tensor | None = None, visual: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute log-sum-exps ``[B, H, R]``, the mass of ``visual`` and what is read; arguments as of the reference.

    Args:
        problem: what is seen, and how.
        value: ``[B, G, m, e]``; None where nothing is read.
        visual: ``[B, m]`` bool; None where nothing is counted.
        weights: floating ``[B, R]`` or ``[B, H, R]``: what is said of rows of weight zero need not be right.
    """
    batch, heads, count, columns = problem.sizes
    groups = int(problem.key.shape[1])
    value = None if value is None else last_contiguous(value)
    width = 1 if value is None else int(value.shape[-1])
    launch = tile(tiles.TILES, problem, heads // groups * count, width)
    down = triton.cdiv(heads // groups * count, launch["ROWS"])
    splits, span = _split(problem.query, down * batch * groups, columns, launch["COLUMNS"])
    device = problem.query.device
    lse = torch.empty((splits, batch, heads, count), dtype=torch.float32, device=device)
    mass = None if visual is None else torch.empty_like(lse)
    # Partial outputs are put together in float32.
    dtype = problem.query.dtype if splits == 1 else torch.float32
    read = None if value is None else torch.empty((*lse.shape, width), dtype=dtype, device=device)
    with torch.cuda.device_of(problem.query):
        _rows_kernel[(down, batch * groups, splits)](
            **arguments(problem),
            value=problem.key if value is None else value,
            value_strides=(0, 0, 0) if value is None else value.stride()[:3],
            visual=as_bytes(visual, problem.query),
            weights=lse if weights is None else weights,
            weights_strides=(0, 0, 0) if weights is None else weight_strides(weights),
            lse=lse,
            mass=lse if mass is None else mass,
            read=lse if read is None else read,
            span=span,
            GROUPS=groups,
            RATIO=heads // groups,
            VALUE_WIDTH=width,
            VALUE_PADDED=FEWEST if value is None else padded(width),
            MASS=mass is not None,
            READ=read is not None,
            USED=weights is not None,
            **launch,
        )
    if splits == 1:
        return lse[0], None if mass is None else mass[0], None if read is None else read[0]
    whole = lse.logsumexp(dim=0)
    share = torch.where(lse == -torch.inf, 0.0, (lse - whole).exp())
    mass = None if mass is None else (mass * share).sum(dim=0)
    if read is not None:
        read = (read * share[..., None]).sum(dim=0).to(problem.query.dtype)
    return whole, mass, read


def probabilities(problem: Problem, lse: Tensor, first: int) -> Tensor:
    """Compute all rows of probabilities, ``[B, H, R, m - first]``."""
    batch, heads, count, columns = problem.sizes
    groups = int(problem.key.shape[1])
    launch = tile(tiles.TILES, problem, heads // groups * count)
    found = torch.empty((batch, heads, count, columns - first), dtype=torch.float32, device=problem.query.device)
    grid = (
        triton.cdiv(columns - first, launch["COLUMNS"]),
        triton.cdiv(heads // groups * count, launch["ROWS"]),
        batch * groups,
    )
    if found.numel():
        with torch.cuda.device_of(problem.query):
            _probabilities_kernel[grid](
                **arguments(problem),
                lse=lse.contiguous(),
                found=found,
                first=first,
                GROUPS=groups,
                RATIO=heads // groups,
                **launch,
            )
    return found


def winners(problem: Problem, lse: Tensor, first: int) -> Tensor:
    """Say which head has the largest entry, int16 ``[B, R, m - first]``; as large as that says, for a few rows."""
    batch, heads, count, columns = problem.sizes
    launch = tile(tiles.TILES, problem, count)
    found = torch.empty((batch, count, columns - first), dtype=torch.int16, device=lse.device)
    grid = (triton.cdiv(columns - first, launch["COLUMNS"]), triton.cdiv(count, launch["ROWS"]), batch)
    with torch.cuda.device_of(lse):
        _winners_kernel[grid](
            **arguments(problem),
            lse=lse.contiguous(),
            found=found,
            first=first,
            HEADS=heads,
            RATIO=heads // int(problem.key.shape[1]),
            **launch,
        )
    return found


def column_sums(
    problem: Problem,
    lse: Tensor,
    weights: Tensor,
    heads: Literal["none", "mean", "max"],
    over: Literal["sum", "max"],
    first: int,
    *,
    named: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Reduce the rows; see the public function.

    Args:
        problem: what is seen, and how.
        lse: float32 ``[B, H, R]``.
        weights: floating ``[B, R]`` or ``[B, H, R]``.
        heads: how heads are reduced.
        over: how rows are reduced.
        first: columns before this one are not returned.
        named: for ``over="max"``, also say which rows the largest entries are of.

    Returns:
        The result, and int32 of the same shape: the row, -1 where no entry is above zero; None unless named.
    """
    batch, count, length, columns = problem.sizes
    # Sums of sums commute: only what does not has all heads in one tile.
    inside = heads == "max" or (heads == "mean" and over == "max")
    inner = count if inside else 1
    outer, named = count // inner, named and over == "max"
    launch = tile(tiles.TILES, problem, length)
    across = triton.cdiv(columns - first, launch["COLUMNS"])
    splits, span = _split(problem.query, across * batch * outer, length, launch["ROWS"])
    found = torch.empty((splits, batch, outer, columns - first), dtype=torch.float32, device=lse.device)
    winners = torch.empty(found.shape if named else 0, dtype=torch.int32, device=lse.device)
    if found.numel():
        with torch.cuda.device_of(problem.query):
            _columns_kernel[(across, splits, batch * outer)](
                **arguments(problem),
                lse=lse.contiguous(),
                weights=weights,
                weights_strides=weight_strides(weights),
                found=found,
                winners=winners if named else found,
                first=first,
                span=span,
                HEADS=count,
                INNER=inner,
                RATIO=count // int(problem.key.shape[1]),
                LARGEST_HEAD=heads == "max",
                LARGEST_ROW=over == "max",
                NAMED=named,
                **launch,
            )
    if over == "max":
        total, split = found.max(dim=0)
        winners = winners.gather(0, split[None])[0] if named else winners
    else:
        total = found.sum(dim=0)
    if heads == "none":
        return total, winners if named else None
    return total[:, 0] if inside else total.mean(dim=1), winners[:, 0] if named else None


def _split(tensor: Tensor, programs: int, length: int, size: int) -> tuple[int, int]:
    """Say into how many parts the ``length`` that programs go along is split, and how long each is."""
    parts = _splits(tensor, programs, triton.cdiv(length, size))
    span = triton.cdiv(triton.cdiv(length, parts), size) * size
    return triton.cdiv(length, span), span


def _splits(tensor: Tensor, programs: int, most: int) -> int:
    """Say into how many parts to split the work of ``programs``, so that no multiprocessor is idle."""
    if not tensor.is_cuda:
        return 1
    wanted = WAVES * torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return max(1, min(wanted // max(1, programs), most))
