"""Gradients of slices of attention in Triton: probabilities are computed anew, and no matrix is stored.

A slice is ``sum_ij P_ij E_ij`` for some E, the pull on the probabilities, so that logits are pulled by
``P_ij (w_i E_ij + a_i)``. What is pulled through the log-sum-exps is in ``a``: minus the sum of the others where they
were computed along, anything where they are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.attention_stats.problem import Problem
from mmfast.kernels.attention_stats.tiles import (
    FEWEST,
    arguments,
    as_bytes,
    last_contiguous,
    logits_of,
    padded,
    reach,
    shares_of,
    states,
    tile,
    weight_strides,
)

# As TILES, for kernels that hold one more tile of states.
TILES_BACK = {128: (64, 64, 4, 2), 256: (64, 64, 8, 1), 512: (32, 32, 4, 1), 1024: (16, 16, 4, 1)}


@dataclass
class Pull:
    """What pulls on the probabilities.

    Attributes:
        form: ``"rows"`` for mass and output, ``"few"`` for probabilities, ``"sums"`` for reduced rows.
        first: columns before this one are not pulled at.
        entries: float32; ``[B, H, R]`` on the mass, ``[B, H, R, m - first]`` on probabilities, or
            ``[B, H or 1, m - first]`` on sums. None = the mass is not asked for.
        weights: floating ``[B, R]`` or ``[B, H, R]`` of rows, for sums.
        rows_won: int32 ``[B, H or 1, m - first]``, the only row that is pulled at, for the largest of the rows.
        heads_won: int16 ``[B, R, m - first]``, the only head that is pulled at, for the largest of the heads.
        visual: ``[B, m]`` bool, for the mass.
        value: ``[B, G, m, e]``, for the output.
        towards: ``[B, H, R, e]`` on the output, in the dtype of ``value``.
    """

    form: Literal["rows", "few", "sums"]
    first: int = 0
    entries: Tensor | None = None
    weights: Tensor | None = None
    rows_won: Tensor | None = None
    heads_won: Tensor | None = None
    visual: Tensor | None = None
    value: Tensor | None = None
    towards: Tensor | None = None


@triton.jit
def _pulled(
    query_tile, key_tile, towards_tile, value_tile, batch, head, row, column, alive, exists, near, far,
    mask, strides, rows, columns, scaling, softcap, temperature,
    lse, entries, entries_strides, rows_won, heads_won, visual, first, HEADS: tl.constexpr,
    MASK: tl.constexpr, BOUNDED: tl.constexpr, CAPPED: tl.constexpr, FORM: tl.constexpr, MASS: tl.constexpr,
    READ: tl.constexpr, LARGEST_ROW: tl.constexpr, LARGEST_HEAD: tl.constexpr,
):  # fmt: skip
    """Compute a tile of probabilities, of the pull on them, and of how logits change with the products."""
    mask_batch, mask_head, mask_row, mask_column = strides[2]
    entries_batch, entries_head = entries_strides
    seen = alive[:, None] & exists[None, :]
    logits, slope = logits_of(
        query_tile, key_tile, near, far, column, seen,
        mask + batch * mask_batch + head * mask_head + row * mask_row, mask_column,
        scaling, softcap, temperature, MASK, BOUNDED, CAPPED,
    )  # fmt: skip
    share = shares_of(logits, lse + (batch * HEADS + head) * rows + row, alive)
    returned = exists & (column >= first)
    pull = tl.zeros_like(share)
    if FORM == "rows":
        if MASS:
            own = tl.load(entries + (batch * HEADS + head) * rows + row, mask=alive, other=0.0)
            counted = tl.load(visual + batch * columns + column, mask=exists, other=0) != 0
            pull += tl.where(counted[None, :], own[:, None], 0.0)
        if READ:
            pull += tl.dot(towards_tile, tl.trans(value_tile), input_precision="ieee")
    elif FORM == "few":
        start = entries + ((batch * HEADS + head) * rows + row) * (columns - first)
        where = alive[:, None] & returned[None, :]
        pull += tl.load(start[:, None] + (column - first)[None, :], mask=where, other=0.0)
    else:
        start = batch * entries_batch + head * entries_head
        own = tl.load(entries + start + (column - first), mask=returned, other=0.0)
        pull += own[None, :]
        if LARGEST_ROW:
            won = tl.load(rows_won + start + (column - first), mask=returned, other=-1)
            pull = tl.where(won[None, :] == row[:, None], pull, 0.0)
        if LARGEST_HEAD:
            start = heads_won + (batch * rows + row) * (columns - first)
            where = alive[:, None] & returned[None, :]
            won = tl.load(start[:, None] + (column - first)[None, :], mask=where, other=-1)
            pull = tl.where(won == head, pull, 0.0)
    return share, pull, slope


@triton.jit(do_not_specialize=["rows", "columns", "first", "window"])
def _query_kernel(
    query, key, spans, valid, mask, strides, rows, columns, window, scaling, softcap, temperature,
    lse, along, entries, entries_strides, weights, weights_strides, rows_won, heads_won, visual,
    value, value_strides, towards, first, target,
    TOTALS: tl.constexpr, EVERY: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, PLACED: tl.constexpr, PACKED: tl.constexpr,
    VALID: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    FORM: tl.constexpr, MASS: tl.constexpr, READ: tl.constexpr, LARGEST_ROW: tl.constexpr,
    LARGEST_HEAD: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gather the gradient of some queries of one head, or only how much pulls at their rows."""
    (query_batch, query_head, query_row), (key_batch, key_head, key_row), _ = strides
    value_batch, value_head, value_row = value_strides
    weights_batch, weights_head, weights_row = weights_strides
    batch = tl.program_id(1).to(tl.int64) // HEADS
    head = tl.program_id(1).to(tl.int64) % HEADS
    group = head // (HEADS // GROUPS)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    at = (batch * HEADS + head) * rows + row
    near, far = reach(spans, batch, row, alive, rows, columns, window, PLACED, PACKED, CAUSAL, WINDOWED)
    query_start = query + batch * query_batch + head * query_head + row * query_row
    query_tile = states(query_start, alive, WIDTH, PADDED, WIDEN)
    towards_tile = query_tile
    if READ:
        towards_tile = states(towards + at * VALUE_WIDTH, alive, VALUE_WIDTH, VALUE_PADDED, WIDEN)
    low = tl.maximum(tl.min(near), 0)
    end = tl.minimum(tl.max(far), columns)
    weight = tl.full([ROWS], 1.0, tl.float32)
    level = tl.zeros([ROWS], tl.float32)
    if FORM == "sums":
        own_weight = weights + batch * weights_batch + head * weights_head + row * weights_row
        weight = tl.load(own_weight, mask=alive, other=0.0).to(tl.float32)
        if not EVERY:
            end = tl.where(tl.max(tl.abs(weight)) > 0.0, end, low)
    if not TOTALS:
        level = tl.load(along + at, mask=alive, other=0.0)
    total = tl.zeros([ROWS], tl.float32)
    gathered = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(low, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS).to(tl.int64)
        exists = column < columns
        if VALID:
            exists = exists & (tl.load(valid + batch * columns + column, mask=exists, other=0) != 0)
        key_start = key + batch * key_batch + group * key_head + column * key_row
        key_tile = states(key_start, exists, WIDTH, PADDED, WIDEN)
        value_tile = key_tile
        if READ:
            value_start = value + batch * value_batch + group * value_head + column * value_row
            value_tile = states(value_start, exists, VALUE_WIDTH, VALUE_PADDED, WIDEN)
        share, pull, slope = _pulled(
            query_tile, key_tile, towards_tile, value_tile, batch, head, row, column, alive, exists, near, far,
            mask, strides, rows, columns, scaling, softcap, temperature,
            lse, entries, entries_strides, rows_won, heads_won, visual, first, HEADS,
            MASK, CAUSAL or WINDOWED or PACKED, CAPPED, FORM, MASS, READ, LARGEST_ROW, LARGEST_HEAD,
        )  # fmt: skip
        if TOTALS:
            total += tl.sum(share * pull, axis=1)
        else:
            found = share * (pull * weight[:, None] + level[:, None]) * slope
            gathered += tl.dot(found.to(key_tile.dtype), key_tile, input_precision="ieee")
    if TOTALS:
        tl.store(target + at, total, mask=alive)
    else:
        channel = tl.arange(0, PADDED)
        stored = alive[:, None] & (channel < WIDTH)[None, :]
        tl.store(target + at[:, None] * WIDTH + channel[None, :], gathered, mask=stored)


@triton.jit(do_not_specialize=["rows", "columns", "first", "window"])
def _key_kernel(
    query, key, spans, valid, mask, strides, rows, columns, window, scaling, softcap, temperature,
    lse, along, entries, entries_strides, weights, weights_strides, rows_won, heads_won, visual,
    value, value_strides, towards, first, target, value_target,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, PLACED: tl.constexpr, PACKED: tl.constexpr,
    VALID: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    FORM: tl.constexpr, MASS: tl.constexpr, READ: tl.constexpr, LARGEST_ROW: tl.constexpr,
    LARGEST_HEAD: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gather the gradients of some keys, and values, over all query heads that read them."""
    (query_batch, query_head, query_row), (key_batch, key_head, key_row), _ = strides
    value_batch, value_head, value_row = value_strides
    weights_batch, weights_head, weights_row = weights_strides
    batch = tl.program_id(1).to(tl.int64) // GROUPS
    group = tl.program_id(1).to(tl.int64) % GROUPS
    begin = tl.program_id(0).to(tl.int64) * COLUMNS
    column = begin + tl.arange(0, COLUMNS)
    stored = column < columns
    exists = stored
    if VALID:
        exists = exists & (tl.load(valid + batch * columns + column, mask=stored, other=0) != 0)
    key_tile = states(key + batch * key_batch + group * key_head + column * key_row, exists, WIDTH, PADDED, WIDEN)
    value_tile = key_tile
    if READ:
        value_start = value + batch * value_batch + group * value_head + column * value_row
        value_tile = states(value_start, exists, VALUE_WIDTH, VALUE_PADDED, WIDEN)
    low, end = begin * 0, begin * 0 + rows
    if not PLACED:
        if CAUSAL:
            low = tl.maximum(low, begin - (columns - rows))
        if WINDOWED:
            end = tl.minimum(end, begin + COLUMNS - 1 + window - (columns - rows))
    gathered = tl.zeros([COLUMNS, PADDED], tl.float32)
    read = tl.zeros([COLUMNS, VALUE_PADDED], tl.float32)
    for inner in range(HEADS // GROUPS):
        head = group * (HEADS // GROUPS) + inner
        for start in range(low, end, ROWS):
            row = start + tl.arange(0, ROWS).to(tl.int64)
            alive = row < rows
            near, far = reach(spans, batch, row, alive, rows, columns, window, PLACED, PACKED, CAUSAL, WINDOWED)
            needed = (tl.max(far) > begin) & (tl.min(near) < begin + COLUMNS)
            weight = tl.full([ROWS], 1.0, tl.float32)
            if FORM == "sums":
                own_weight = weights + batch * weights_batch + head * weights_head + row * weights_row
                weight = tl.load(own_weight, mask=alive, other=0.0).to(tl.float32)
                needed = needed & (tl.max(tl.abs(weight)) > 0.0)
            if needed:
                at = (batch * HEADS + head) * rows + row
                level = tl.load(along + at, mask=alive, other=0.0)
                query_start = query + batch * query_batch + head * query_head + row * query_row
                query_tile = states(query_start, alive, WIDTH, PADDED, WIDEN)
                towards_tile = query_tile
                if READ:
                    towards_tile = states(towards + at * VALUE_WIDTH, alive, VALUE_WIDTH, VALUE_PADDED, WIDEN)
                share, pull, slope = _pulled(
                    query_tile, key_tile, towards_tile, value_tile, batch, head, row, column, alive, exists,
                    near, far, mask, strides, rows, columns, scaling, softcap, temperature,
                    lse, entries, entries_strides, rows_won, heads_won, visual, first, HEADS,
                    MASK, CAUSAL or WINDOWED or PACKED, CAPPED, FORM, MASS, READ, LARGEST_ROW, LARGEST_HEAD,
                )  # fmt: skip
                found = share * (pull * weight[:, None] + level[:, None]) * slope
                gathered += tl.dot(tl.trans(found.to(query_tile.dtype)), query_tile, input_precision="ieee")
                if READ:
                    given = share.to(towards_tile.dtype)
                    read += tl.dot(tl.trans(given), towards_tile, input_precision="ieee")
    at = ((batch * GROUPS + group) * columns + column)[:, None]
    channel = tl.arange(0, PADDED)
    inside = stored[:, None] & (channel < WIDTH)[None, :]
    tl.store(target + at * WIDTH + channel[None, :], gathered, mask=inside)
    if READ:
        channel = tl.arange(0, VALUE_PADDED)
        inside = stored[:, None] & (channel < VALUE_WIDTH)[None, :]
        tl.store(value_target + at * VALUE_WIDTH + channel[None, :], read, mask=inside)


@triton.jit(do_not_specialize=["rows", "columns", "first", "window", "batches", "heads", "down", "across"])
def _mask_kernel(
    query, key, spans, valid, mask, strides, rows, columns, window, scaling, softcap, temperature,
    lse, along, entries, entries_strides, weights, weights_strides, rows_won, heads_won, visual,
    value, value_strides, towards, first, target, batches, heads, down, across,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, PLACED: tl.constexpr, PACKED: tl.constexpr,
    VALID: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    FORM: tl.constexpr, MASS: tl.constexpr, READ: tl.constexpr, LARGEST_ROW: tl.constexpr,
    LARGEST_HEAD: tl.constexpr, ROWS_SHARED: tl.constexpr, COLUMNS_SHARED: tl.constexpr,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gather the gradient of a tile of the mask over all prompts, heads, rows and columns that share it.

    ``batches`` and ``heads`` share one entry, and ``down`` and ``across`` tiles: each of them 1 where none do.
    """
    (query_batch, query_head, query_row), (key_batch, key_head, key_row) = strides[0], strides[1]
    value_batch, value_head, value_row = value_strides
    weights_batch, weights_head, weights_row = weights_strides
    own = tl.program_id(2).to(tl.int64)
    own_batch, own_head = own // (HEADS // heads), own % (HEADS // heads)
    gathered = tl.zeros([ROWS, COLUMNS], tl.float32)
    for turn in range(batches * heads * down * across):
        rest = turn // across
        column = (tl.program_id(1).to(tl.int64) + turn % across) * COLUMNS + tl.arange(0, COLUMNS)
        row = (tl.program_id(0).to(tl.int64) + rest % down) * ROWS + tl.arange(0, ROWS)
        rest = rest // down
        head = own_head * heads + rest % heads
        batch = own_batch * batches + rest // heads
        group = head // (HEADS // GROUPS)
        alive = row < rows
        exists = column < columns
        if VALID:
            exists = exists & (tl.load(valid + batch * columns + column, mask=exists, other=0) != 0)
        near, far = reach(spans, batch, row, alive, rows, columns, window, PLACED, PACKED, CAUSAL, WINDOWED)
        if (tl.max(far) > tl.min(column)) & (tl.min(near) <= tl.max(column)):
            at = (batch * HEADS + head) * rows + row
            weight = tl.full([ROWS], 1.0, tl.float32)
            if FORM == "sums":
                own_weight = weights + batch * weights_batch + head * weights_head + row * weights_row
                weight = tl.load(own_weight, mask=alive, other=0.0).to(tl.float32)
            level = tl.load(along + at, mask=alive, other=0.0)
            query_start = query + batch * query_batch + head * query_head + row * query_row
            key_start = key + batch * key_batch + group * key_head + column * key_row
            query_tile = states(query_start, alive, WIDTH, PADDED, WIDEN)
            key_tile = states(key_start, exists, WIDTH, PADDED, WIDEN)
            towards_tile, value_tile = query_tile, key_tile
            if READ:
                value_start = value + batch * value_batch + group * value_head + column * value_row
                towards_tile = states(towards + at * VALUE_WIDTH, alive, VALUE_WIDTH, VALUE_PADDED, WIDEN)
                value_tile = states(value_start, exists, VALUE_WIDTH, VALUE_PADDED, WIDEN)
            share, pull, _ = _pulled(
                query_tile, key_tile, towards_tile, value_tile, batch, head, row, column, alive, exists, near, far,
                mask, strides, rows, columns, scaling, softcap, temperature,
                lse, entries, entries_strides, rows_won, heads_won, visual, first, HEADS,
                MASK, CAUSAL or WINDOWED or PACKED, CAPPED, FORM, MASS, READ, LARGEST_ROW, LARGEST_HEAD,
            )  # fmt: skip
            gathered += share * (pull * weight[:, None] + level[:, None])
    gathered = gathered / tl.full([], temperature, tl.float32)
    # What is shared by tiles is added up in the tile at last, and lies in its first row or column.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    height, width = rows, columns
    if ROWS_SHARED:
        gathered = tl.sum(gathered, axis=0)[None, :] + tl.zeros_like(gathered)
        height = 1
    if COLUMNS_SHARED:
        gathered = tl.sum(gathered, axis=1)[:, None] + tl.zeros_like(gathered)
        width = 1
    stored = (row < height)[:, None] & (column < width)[None, :]
    tl.store(target + (own * height + row)[:, None] * width + column[None, :], gathered, mask=stored)


def totals(problem: Problem, pull: Pull, lse: Tensor, *, every: bool) -> Tensor:
    """Compute how much pulls at each row, ``sum_j P_ij E_ij`` as float32 ``[B, H, R]``.

    Args:
        problem: what is seen, and how.
        pull: E.
        lse: float32 ``[B, H, R]``.
        every: also of rows of weight zero.
    """
    batch, heads, rows, _ = problem.sizes
    found = torch.empty((batch, heads, rows), dtype=torch.float32, device=lse.device)
    given = _given(problem, pull, lse, lse)
    with torch.cuda.device_of(lse):
        _query_kernel[(triton.cdiv(rows, given["ROWS"]), batch * heads)](
            **given, target=found, TOTALS=True, EVERY=every
        )
    return found


def query_gradient(problem: Problem, pull: Pull, lse: Tensor, along: Tensor) -> Tensor:
    """Compute what pulls at the queries, float32 ``[B, H, R, d]``; ``along`` is float32 ``[B, H, R]``."""
    batch, heads, rows, _ = problem.sizes
    found = torch.empty(problem.query.shape, dtype=torch.float32, device=lse.device)
    given = _given(problem, pull, lse, along)
    with torch.cuda.device_of(lse):
        _query_kernel[(triton.cdiv(rows, given["ROWS"]), batch * heads)](
            **given, target=found, TOTALS=False, EVERY=False
        )
    return found


def key_gradient(problem: Problem, pull: Pull, lse: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what pulls at keys and values, float32 ``[B, G, m, d]`` and, if read, ``[B, G, m, e]``."""
    found = torch.empty(problem.key.shape, dtype=torch.float32, device=lse.device)
    shape = (0,) if pull.value is None else pull.value.shape
    values = torch.empty(shape, dtype=torch.float32, device=lse.device)
    batch, groups, columns, _ = problem.key.shape
    given = _given(problem, pull, lse, along)
    with torch.cuda.device_of(lse):
        _key_kernel[(triton.cdiv(columns, given["COLUMNS"]), batch * groups)](
            **given, target=found, value_target=found if pull.value is None else values
        )
    return found, values


def mask_gradient(problem: Problem, pull: Pull, lse: Tensor, along: Tensor) -> Tensor:
    """Compute what pulls at an additive mask, float32 in its shape."""
    mask = problem.mask
    if mask is None:
        raise ValueError("mask=None has no gradient")
    batch, heads, rows, columns = problem.sizes
    given = _given(problem, pull, lse, along)
    found = torch.empty(mask.shape, dtype=torch.float32, device=lse.device)
    tiles = [triton.cdiv(rows, given["ROWS"]), triton.cdiv(columns, given["COLUMNS"])]
    shared = [axis == 1 for axis in mask.shape[2:]]
    grid = [1 if same else count for same, count in zip(shared, tiles, strict=True)]
    with torch.cuda.device_of(lse):
        _mask_kernel[(*grid, mask.shape[0] * mask.shape[1])](
            **given,
            target=found,
            batches=batch // mask.shape[0],
            heads=heads // mask.shape[1],
            down=tiles[0] if shared[0] else 1,
            across=tiles[1] if shared[1] else 1,
            ROWS_SHARED=shared[0],
            COLUMNS_SHARED=shared[1],
        )
    return found


def _given(problem: Problem, pull: Pull, lse: Tensor, along: Tensor) -> dict[str, Any]:
    """Return what all three kernels take."""
    query, value, entries = problem.query, pull.value, pull.entries
    value = None if value is None else last_contiguous(value)
    width = 1 if value is None else int(value.shape[-1])
    heads, rows = problem.sizes[1:3]
    entries = None if entries is None else entries.contiguous()
    strides = (0, 0)
    if pull.form == "sums" and entries is not None:
        strides = (entries.stride(0), entries.stride(1) if entries.shape[1] > 1 else 0)
    weights = lse if pull.weights is None else pull.weights
    return {
        **arguments(problem),
        "lse": lse.contiguous(),
        "along": along.contiguous(),
        "entries": lse if entries is None else entries,
        "entries_strides": strides,
        "weights": weights,
        "weights_strides": (0, 0, 0) if pull.weights is None else weight_strides(weights),
        "rows_won": lse if pull.rows_won is None else pull.rows_won.contiguous(),
        "heads_won": lse if pull.heads_won is None else pull.heads_won.contiguous(),
        "visual": as_bytes(pull.visual, query),
        "value": problem.key if value is None else value,
        "value_strides": (0, 0, 0) if value is None else value.stride()[:3],
        "towards": query if pull.towards is None else pull.towards.contiguous(),
        "first": pull.first,
        "HEADS": heads,
        "GROUPS": int(problem.key.shape[1]),
        "VALUE_WIDTH": width,
        "VALUE_PADDED": FEWEST if value is None else padded(width),
        "FORM": pull.form,
        "MASS": pull.form == "rows" and entries is not None,
        "READ": value is not None,
        "LARGEST_ROW": pull.rows_won is not None,
        "LARGEST_HEAD": pull.heads_won is not None,
        **tile(TILES_BACK, problem, rows, width),
    }
