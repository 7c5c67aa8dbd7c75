"""Triton: tiles that no rectangle touches are passed over, and only those on an edge look at the rectangles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.dispatch import interpreted
from mmfast.kernels.parts import nothing
from mmfast.kernels.split_attention import block_of, capped, inner_contiguous, online, write

_TILES = {2: ((128, 64, 64), (256, 64, 32)), 4: ((64, 64, 32), (128, 32, 32), (256, 16, 16))}
"""Bytes of a number -> (widest head, rows of a tile, columns of a tile)."""

_NONE, _SOME, _ALL = 0, 1, 2
"""How much of a tile is visible."""


@triton.jit
def _load(start, step, at, live, WIDTH: tl.constexpr, PADDED: tl.constexpr,
          UPCAST: tl.constexpr):  # fmt: skip
    """Load states ``[len(at), PADDED]``."""
    channel = tl.arange(0, PADDED)
    there = live[:, None] & (channel < WIDTH)[None, :]
    states = tl.load(start + at[:, None] * step + channel[None, :], mask=there, other=0.0)
    if UPCAST:
        states = states.to(tl.float32)
    return states


@triton.jit
def _logits(
    q, k, kind, rectangles, count, valid,
    row, place, column, rows, columns,
    scaling, softcap, CAPPED: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """Return the logits ``[R, N]`` of a tile, minus infinity where nothing is seen."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    if CAPPED:
        logits = capped(logits, softcap)
    visible = (row < rows)[:, None] & (column < columns)[None, :]
    if kind == 1:
        some = (row < 0)[:, None] & (column < 0)[None, :]
        for index in range(count):
            one = rectangles + index * 5
            in_rows = (row >= tl.load(one)) & (row < tl.load(one + 1))
            in_columns = (column >= tl.load(one + 2)) & (column < tl.load(one + 3))
            below = (column[None, :] <= place[:, None]) | (tl.load(one + 4) == 0)
            some = some | (in_rows[:, None] & in_columns[None, :] & below)
        visible = visible & some
        if VALID:
            real = tl.load(valid + column, mask=column < columns, other=0) != 0
            visible = visible & real[None, :]
    return tl.where(visible, logits, float("-inf"))


@triton.jit(do_not_specialize=["rows", "columns", "count"])
def _forward(
    query, key, value, tiles, rectangles, places,
    valid, output, weight,
    q_b, q_h, q_r, k_b, k_g, k_n,
    v_b, v_g, v_n,
    heads, share, rows, columns, count,
    scaling, softcap,
    D: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    CAPPED: tl.constexpr, VALID: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of rows of one head."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    tile = tl.program_id(0).to(tl.int64)
    row = tile * BR + tl.arange(0, BR)
    live = row < rows
    place = tl.load(places + batch * rows + row, mask=live, other=-1)
    q = _load(query + batch * q_b + head * q_h, q_r, row, live, D, BD, UPCAST)
    acc = tl.zeros([BR, BV], tl.float32)
    top = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    across = tl.cdiv(columns, BN)
    down = tl.cdiv(rows, BR)
    for step in range(across):
        kind = tl.load(tiles + (batch * down + tile) * across + step)
        if kind != 0:
            column = tl.cast(step, tl.int64) * BN + tl.arange(0, BN)
            there = column < columns
            k = _load(key + batch * k_b + (head // share) * k_g, k_n, column, there, D, BD, UPCAST)
            v = _load(value + batch * v_b + (head // share) * v_g, v_n, column, there, V, BV, UPCAST)
            logits = _logits(
                q, k, kind, rectangles + batch * count * 5, count, valid + batch * columns, row, place, column,
                rows, columns, scaling, softcap, CAPPED, VALID,
            )  # fmt: skip
            acc, top, total = online(acc, top, total, logits, v)
    write(acc, top, total, output, weight, pair * rows + row, live, V, BV)


@triton.jit
def _logit_gradient(
    logits, top, slope, towards, v, scaling,
    softcap, CAPPED: tl.constexpr,
):  # fmt: skip
    """Return shares ``[R, N]``, and the gradient of the products of queries and keys."""
    # Rows that see nothing have a weight of minus infinity.
    base = tl.where(top == float("-inf"), 0.0, top)
    shares = tl.exp(logits - base[:, None])
    gradient = shares * (tl.dot(towards, tl.trans(v), input_precision="ieee") - slope[:, None]) * scaling
    if CAPPED:
        ratio = tl.where(shares > 0, logits / softcap, 0.0)
        gradient = gradient * (1.0 - ratio * ratio)
    return shares, gradient


@triton.jit(do_not_specialize=["rows", "columns", "count"])
def _backward_query(
    query, key, value, tiles, rectangles, places,
    valid, weight, slopes, towards, gradient,
    q_b, q_h, q_r, k_b, k_g, k_n,
    v_b, v_g, v_n,
    heads, share, rows, columns, count,
    scaling, softcap,
    D: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    CAPPED: tl.constexpr, VALID: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gather the gradient of one tile of query rows."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    tile = tl.program_id(0).to(tl.int64)
    row = tile * BR + tl.arange(0, BR)
    live = row < rows
    place = tl.load(places + batch * rows + row, mask=live, other=-1)
    q = _load(query + batch * q_b + head * q_h, q_r, row, live, D, BD, UPCAST)
    to = _load(towards + pair * rows * V, V, row, live, V, BV, UPCAST)
    top = tl.load(weight + pair * rows + row, mask=live, other=float("-inf"))
    slope = tl.load(slopes + pair * rows + row, mask=live, other=0.0)
    acc = tl.zeros([BR, BD], tl.float32)
    across = tl.cdiv(columns, BN)
    down = tl.cdiv(rows, BR)
    for step in range(across):
        kind = tl.load(tiles + (batch * down + tile) * across + step)
        if kind != 0:
            column = tl.cast(step, tl.int64) * BN + tl.arange(0, BN)
            there = column < columns
            k = _load(key + batch * k_b + (head // share) * k_g, k_n, column, there, D, BD, UPCAST)
            v = _load(value + batch * v_b + (head // share) * v_g, v_n, column, there, V, BV, UPCAST)
            logits = _logits(
                q, k, kind, rectangles + batch * count * 5, count, valid + batch * columns, row, place, column,
                rows, columns, scaling, softcap, CAPPED, VALID,
            )  # fmt: skip
            _, slant = _logit_gradient(logits, top, slope, to, v, scaling, softcap, CAPPED)
            acc += tl.dot(slant.to(k.dtype), k, input_precision="ieee")
    channel = tl.arange(0, BD)
    there = live[:, None] & (channel < D)[None, :]
    target = gradient + (pair * rows + row)[:, None] * D + channel[None, :]
    tl.store(target, acc.to(gradient.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows", "columns", "count"])
def _backward_states(
    query, key, value, tiles, rectangles, places,
    valid, weight, slopes, towards,
    key_gradient, value_gradient,
    q_b, q_h, q_r, k_b, k_g, k_n,
    v_b, v_g, v_n,
    groups, share, rows, columns, count,
    scaling, softcap,
    D: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    CAPPED: tl.constexpr, VALID: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gather the gradients of one tile of keys and values over all query heads that read them."""
    pair = tl.program_id(1).to(tl.int64)
    batch, group = pair // groups, pair % groups
    tile = tl.program_id(0).to(tl.int64)
    column = tile * BN + tl.arange(0, BN)
    there = column < columns
    k = _load(key + batch * k_b + group * k_g, k_n, column, there, D, BD, UPCAST)
    v = _load(value + batch * v_b + group * v_g, v_n, column, there, V, BV, UPCAST)
    of_keys = tl.zeros([BN, BD], tl.float32)
    of_values = tl.zeros([BN, BV], tl.float32)
    across = tl.cdiv(columns, BN)
    down = tl.cdiv(rows, BR)
    for turn in range(share * down):
        step = turn % down
        kind = tl.load(tiles + (batch * down + step) * across + tile)
        if kind != 0:
            head = group * share + turn // down
            own = (batch * groups * share + head) * rows
            row = tl.cast(step, tl.int64) * BR + tl.arange(0, BR)
            live = row < rows
            place = tl.load(places + batch * rows + row, mask=live, other=-1)
            q = _load(query + batch * q_b + head * q_h, q_r, row, live, D, BD, UPCAST)
            to = _load(towards + own * V, V, row, live, V, BV, UPCAST)
            top = tl.load(weight + own + row, mask=live, other=float("-inf"))
            slope = tl.load(slopes + own + row, mask=live, other=0.0)
            logits = _logits(
                q, k, kind, rectangles + batch * count * 5, count, valid + batch * columns, row, place, column,
                rows, columns, scaling, softcap, CAPPED, VALID,
            )  # fmt: skip
            shares, slant = _logit_gradient(logits, top, slope, to, v, scaling, softcap, CAPPED)
            of_values += tl.dot(tl.trans(shares.to(to.dtype)), to, input_precision="ieee")
            of_keys += tl.dot(tl.trans(slant.to(q.dtype)), q, input_precision="ieee")
    channel = tl.arange(0, BD)
    target = key_gradient + (pair * columns + column)[:, None] * D + channel[None, :]
    inside = there[:, None] & (channel < D)[None, :]
    tl.store(target, of_keys.to(key_gradient.dtype.element_ty), mask=inside)
    channel = tl.arange(0, BV)
    target = value_gradient + (pair * columns + column)[:, None] * V + channel[None, :]
    inside = there[:, None] & (channel < V)[None, :]
    tl.store(target, of_values.to(value_gradient.dtype.element_ty), mask=inside)


def tiles_of(
    rectangles: Tensor, places: Tensor, valid: Tensor | None, columns: int, block_rows: int, block: int
) -> Tensor:
    """Say how much of each tile is visible: nothing, something or everything.

    Args:
        rectangles: ``[B, M, 5]``.
        places: ``[B, q]``.
        valid: ``[B, n]``.
        columns: n.
        block_rows: rows of a tile.
        block: columns of a tile.

    Returns:
        int8 ``[B, tiles down, tiles across]``: 0, 1 or 2; 1 may stand for any of them.
    """
    batch, rows = places.shape
    top = torch.arange(0, rows, block_rows, device=places.device)[:, None]
    left = torch.arange(0, columns, block, device=places.device)
    bottom, right = (top + block_rows).clamp(max=rows), (left + block).clamp(max=columns)
    pad = -rows % block_rows
    highest = torch.nn.functional.pad(places, (0, pad), value=-1).unflatten(1, (-1, block_rows)).amax(dim=2)
    lowest = torch.nn.functional.pad(places, (0, pad), value=columns).unflatten(1, (-1, block_rows)).amin(dim=2)
    first, behind, begin, end, causal = (bound[..., None, None] for bound in rectangles.unbind(dim=2))
    free = causal == 0
    touched = (first < bottom) & (behind > top) & (begin < right) & (end > left)
    # Without rows or columns of its own a rectangle touches nothing.
    touched = touched & (first < behind) & (begin < end) & (free | (left <= highest[:, None, :, None]))
    whole = (first <= top) & (behind >= bottom) & (begin <= left) & (end >= right)
    whole = (whole & (free | (right - 1 <= lowest[:, None, :, None]))).any(dim=1)
    if valid is not None:
        padded = torch.nn.functional.pad(valid, (0, -columns % block), value=True)
        whole = whole & padded.unflatten(1, (-1, block)).all(dim=2)[:, None]
    kinds = torch.where(whole, _ALL, torch.where(touched.any(dim=1), _SOME, _NONE))
    return kinds.expand(batch, -1, -1).to(torch.int8).contiguous()


class _Attention(torch.autograd.Function):
    """The kernels, known to autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rectangles: Tensor,
        places: Tensor,
        valid: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Attend, and remember what the way back needs."""
        batch, heads, rows, width = query.shape
        columns, own = value.shape[2:]
        query, key, value = (inner_contiguous(states) for states in (query, key, value))
        rectangles, places = rectangles.int().contiguous(), places.long().contiguous()
        size = 4 if interpreted() else query.element_size()
        block_rows, block = next((r, n) for widest, r, n in _TILES[size] if max(width, own) <= widest)
        real = places if valid is None else valid.contiguous().view(torch.uint8)
        output = query.new_empty(batch, heads, rows, own)
        weight = query.new_empty(batch, heads, rows, dtype=torch.float32)
        with torch.cuda.device_of(query):
            tiles = tiles_of(rectangles, places, valid, columns, block_rows, block)
            ctx.numbers = (rows, columns, rectangles.shape[1], scaling, 1.0 if softcap is None else softcap)
            ctx.options = {
                "D": width, "V": own, "BR": block_rows, "BN": block, "BD": block_of(width), "BV": block_of(own),
                "CAPPED": softcap is not None, "VALID": valid is not None,
                "UPCAST": interpreted() or query.dtype == torch.float32, "num_warps": 4, "num_stages": 2,
            }  # fmt: skip
            _forward[(-(-rows // block_rows), batch * heads)](
                query, key, value, tiles, rectangles, places, real, output, weight,
                *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
                heads, heads // key.shape[1], *ctx.numbers, **ctx.options,
            )  # fmt: skip
        ctx.save_for_backward(query, key, value, tiles, rectangles, places, real, output, weight)
        return output, weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        query, key, value, tiles, rectangles, places, real, output, weight = ctx.saved_tensors
        batch, heads, rows = query.shape[:3]
        groups, columns = value.shape[1:3]
        towards = gradients[0].contiguous()
        slopes = ((towards.float() * output.float()).sum(dim=-1) - gradients[1]).contiguous()
        of_query = query.new_empty(query.shape)
        of_key, of_value = key.new_empty(key.shape), value.new_empty(value.shape)
        given = (query, key, value, tiles, rectangles, places, real, weight, slopes, towards)
        strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
        share, sizes = heads // groups, ctx.options
        with torch.cuda.device_of(query):
            _backward_query[(-(-rows // sizes["BR"]), batch * heads)](
                *given, of_query, *strides, heads, share, *ctx.numbers, **sizes
            )
            _backward_states[(-(-columns // sizes["BN"]), batch * groups)](
                *given, of_key, of_value, *strides, groups, share, *ctx.numbers, **sizes
            )
        return of_query, of_key, of_value, None, None, None, None, None


def attend_rectangles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rectangles: Tensor,
    places: Tensor,
    valid: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend; arguments as of the reference."""
    if not query.numel() or not key.shape[2] or not rectangles.shape[1]:
        output, weight = nothing(query, value.shape[3])
        return output.to(query.dtype), weight
    apply: Callable[..., tuple[Tensor, Tensor]] = _Attention.apply
    return apply(query, key, value, rectangles, places, valid, scaling, softcap)
