"""Triton: few query rows attend to long sequences that are split over programs and put together exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.dispatch import interpreted
from mmfast.kernels.parts import nothing

_MOST_SPLITS = 64
_ROWS = (16, 32, 64)
"""Query rows of a program; 16 is the least that tensor cores take."""

_ENTRIES = {2: ((64, 128), (128, 64), (256, 32)), 4: ((64, 64), (128, 32), (256, 16))}
"""Bytes of a number -> (widest head, entries that are read at a time)."""


@dataclass(frozen=True, eq=False)
class Source:
    """Keys and values to attend to, and who may see which.

    Attributes:
        key: ``[B, G, n, d]``, or ``[1, G, n, d]`` where all rows of the batch share them.
        value: ``[B, G, n, v]``.
        kept: bool ``[B, S, q, m]``, which of the first m entries each query row sees, S dividing the query heads.
        bias: float ``[B, S, m]``, added to the logits of the first m entries.
        sees: bool ``[B, q, q]``, which of the last q entries each query row sees.
        indices: ``[B, S, K]``, the entries to read; S a multiple of G that divides the query heads.
        counts: ``[B, S]``, how many of the indices are real.
        limits: ``[B, q]``, the last entry each query row sees.
    """

    key: Tensor
    value: Tensor
    kept: Tensor | None = None
    bias: Tensor | None = None
    sees: Tensor | None = None
    indices: Tensor | None = None
    counts: Tensor | None = None
    limits: Tensor | None = None


@triton.jit
def capped(logits, softcap):
    """Cap logits: ``softcap * tanh(logits / softcap)``."""
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))


@triton.jit
def online(acc, top, total, logits, value):
    """Take in the logits ``[R, N]`` and values ``[N, V]`` of further entries."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    # Rows that have seen nothing yet: minus infinity less minus infinity is not a number.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shares = tl.exp(logits - base[:, None])
    shrink = tl.exp(top - base)
    acc = acc * shrink[:, None] + tl.dot(shares.to(value.dtype), value, input_precision="ieee")
    return acc, new_top, total * shrink + tl.sum(shares, 1)


@triton.jit
def write(
    acc,
    top,
    total,
    output,
    weight,
    place,
    live,
    V: tl.constexpr,
    BV: tl.constexpr,
) -> None:
    """Write the output and the weight of each live row to its place."""
    seen = total > 0
    columns = tl.arange(0, BV)
    result = acc / tl.where(seen, total, 1.0)[:, None]
    there = live[:, None] & (columns < V)[None, :]
    tl.store(output + place[:, None] * V + columns[None, :], result.to(output.dtype.element_ty), mask=there)
    tl.store(weight + place, tl.where(seen, top + tl.log(tl.where(seen, total, 1.0)), float("-inf")), mask=live)


_VARIABLE = ["rows", "share", "tokens", "entries", "stored", "past", "per_split", "first", "parts"]
_VARIABLE += ["m_b", "m_h", "m_t", "b_b", "b_h"]
"""What changes from step to step, and the strides that do; specialised on it, kernels would be compiled anew."""


@triton.jit(do_not_specialize=_VARIABLE)
def _partial(
    query, key, value, kept, bias, sees, indices, counts, limits,
    output, weight,
    q_b, q_h, q_t, k_b, k_g, k_n, v_b, v_g, v_n,
    m_b, m_h, m_t, m_n, b_b, b_h, b_n,
    rows, share, tokens, sources, key_per, kept_per, bias_per,
    entries, stored, past, per_split, first, parts, scaling, softcap,
    D: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    KEPT: tl.constexpr, BIAS: tl.constexpr, SEES: tl.constexpr, INDEXED: tl.constexpr, LIMITS: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of rows to one split of the entries of one head."""
    pair = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    of_batch, source = pair // sources, pair % sources
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    live = row < rows
    # Where a batch shares its keys there are rows of all of it in a tile.
    batch = of_batch + row // (share * tokens)
    head = source * share + (row // tokens) % share
    token = row % tokens
    group = source // key_per
    width, columns = tl.arange(0, BD), tl.arange(0, BV)
    q = tl.load(
        query + (batch * q_b + head * q_h + token * q_t)[:, None] + width[None, :],
        mask=live[:, None] & (width < D)[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    if LIMITS:
        limit = tl.load(limits + batch * tokens + token, mask=live, other=-1)
    acc = tl.zeros([BR, BV], tl.float32)
    top = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    begin = split * per_split
    end = tl.minimum(begin + per_split, entries)
    if INDEXED:
        end = tl.minimum(end, tl.load(counts + pair).to(tl.int32))
    for start in range(begin, end, BN):
        slot = start + tl.arange(0, BN)
        there = slot < end
        if INDEXED:
            place = tl.load(indices + pair * entries + slot, mask=there, other=-1).to(tl.int64)
            there = there & (place >= 0) & (place < stored)
        else:
            place = slot.to(tl.int64)
        visible = live[:, None] & there[None, :]
        old = (place < past)[None, :]
        if KEPT:
            line = batch * m_b + (head // kept_per) * m_h + token * m_t
            mark = tl.load(kept + line[:, None] + place[None, :] * m_n, mask=visible & old, other=0)
            visible = visible & ((mark != 0) | (old == 0))
        if SEES:
            line = (batch * tokens + token) * tokens - past
            mark = tl.load(sees + line[:, None] + place[None, :], mask=visible & (old == 0), other=0)
            visible = visible & ((mark != 0) | old)
        if LIMITS:
            visible = visible & (place[None, :] <= limit[:, None])
        needed = tl.max(visible.to(tl.int32), 0) > 0
        if tl.max(needed.to(tl.int32), 0) > 0:
            # What nobody sees is not read.
            k = tl.load(
                key + of_batch * k_b + group * k_g + place[:, None] * k_n + width[None, :],
                mask=needed[:, None] & (width < D)[None, :],
                other=0.0,
            )
            v = tl.load(
                value + of_batch * v_b + group * v_g + place[:, None] * v_n + columns[None, :],
                mask=needed[:, None] & (columns < V)[None, :],
                other=0.0,
            )
            if UPCAST:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
            if CAPPED:
                logits = capped(logits, softcap)
            if BIAS:
                line = batch * b_b + (head // bias_per) * b_h
                added = tl.load(bias + line[:, None] + place[None, :] * b_n, mask=visible & old, other=0.0)
                logits += added.to(tl.float32)
            acc, top, total = online(acc, top, total, tl.where(visible, logits, float("-inf")), v)
    heads = sources * share
    written = ((batch * heads + head) * tokens + token) * parts + first + split
    write(acc, top, total, output, weight, written, live, V, BV)


@triton.jit(do_not_specialize=["parts"])
def _merge(
    partial, weights, output, weight, parts,
    V: tl.constexpr, BP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Put the parts of one row together."""
    row = tl.program_id(0).to(tl.int64)
    part, columns = tl.arange(0, BP), tl.arange(0, BV)
    own = tl.load(weights + row * parts + part, mask=part < parts, other=float("-inf"))
    top = tl.max(own, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    shares = tl.exp(own - base)
    total = tl.sum(shares, 0)
    seen = total > 0
    states = tl.load(
        partial + (row * parts + part)[:, None] * V + columns[None, :],
        mask=(part < parts)[:, None] & (columns < V)[None, :],
        other=0.0,
    )
    result = tl.sum(states * shares[:, None], 0) / tl.where(seen, total, 1.0)
    tl.store(output + row * V + columns, result.to(output.dtype.element_ty), mask=columns < V)
    tl.store(weight + row, tl.where(seen, base + tl.log(tl.where(seen, total, 1.0)), float("-inf")))


def block_of(width: int) -> int:
    """Return the power of two that covers a width, at least what tensor cores take."""
    return max(16, int(triton.next_power_of_2(width)))


def entries_of(tensor: Tensor, width: int) -> int:
    """Say how many entries are read at a time."""
    size = 4 if interpreted() else tensor.element_size()
    return next(count for widest, count in _ENTRIES[size] if width <= widest)


def rows_of(rows: int) -> int:
    """Say how many query rows a program takes."""
    return next((size for size in _ROWS if rows <= size), _ROWS[-1])


def splits_of(device: torch.device, programs: int, entries: int, block: int) -> tuple[int, int]:
    """Say into how many parts entries are split, and how many a part has, so that a device is kept busy."""
    wanted = -(-2 * processors(device) // max(1, programs))
    splits = max(1, min(wanted, -(-entries // block), _MOST_SPLITS))
    per_split = -(-entries // splits // block) * block
    return -(-entries // per_split), per_split


def processors(device: torch.device) -> int:
    """Say how many programs run at once; a few where they are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class Parts:
    """Where parts of an attention are written, and how they come together.

    Args:
        query: ``[B, H, q, d]``.
        width: v, of the values.
        parts: how many there will be.
    """

    def __init__(self, query: Tensor, width: int, parts: int) -> None:
        shape = tuple(query.shape[:-1])
        self.shape, self.width, self.parts = shape, width, parts
        # A single part is the result.
        dtype = query.dtype if parts == 1 else torch.float32
        self.result_dtype = query.dtype
        self.output = query.new_empty((*shape, parts, width), dtype=dtype)
        self.weight = query.new_empty((*shape, parts), dtype=torch.float32)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return ``[B, H, q, v]`` in the dtype of the query, and ``[B, H, q]`` float32."""
        if self.parts == 1:
            return self.output[..., 0, :], self.weight[..., 0]
        output = self.output.new_empty((*self.shape, self.width), dtype=self.result_dtype)
        weight = self.weight.new_empty(self.shape)
        _merge[(weight.numel(),)](
            self.output, self.weight, output, weight, self.parts,
            V=self.width, BP=triton.next_power_of_2(self.parts), BV=triton.next_power_of_2(self.width),
        )  # fmt: skip
        return output, weight


def inner_contiguous(tensor: Tensor) -> Tensor:
    """Return a tensor whose last axis lies side by side in memory."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def attend(
    query: Tensor, sources: Sequence[Source], *, scaling: float | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attend to all entries of all sources.

    Args:
        query: ``[B, H, q, d]``.
        sources: at least one.
        scaling: factor of the logits, ``d ** -0.5`` when None.
        softcap: cap of the logits.

    Returns:
        ``[B, H, q, v]`` in the dtype of the query, and float32 ``[B, H, q]`` logarithm of the sum of the exponentials
        of the logits; zero and minus infinity for rows that see nothing.
    """
    width = sources[0].value.shape[-1]
    plans = []
    for source in sources:
        entries = source.key.shape[2] if source.indices is None else source.indices.shape[2]
        if entries and query.numel():
            plans.append((source, entries, *_sizes(query, source, entries)))
    if not plans:
        output, weight = nothing(query, width)
        return output.to(query.dtype), weight
    query = inner_contiguous(query)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.cuda.device_of(query):
        parts = Parts(query, width, sum(plan[-2] for plan in plans))
        first = 0
        for source, entries, block_rows, block, splits, per_split in plans:
            _launch(query, source, parts, first, entries, (block_rows, block, splits, per_split), scaling, softcap)
            first += splits
        return parts.merged()


def _read_heads(source: Source) -> int:
    return source.key.shape[1] if source.indices is None else source.indices.shape[1]


def _shared(query: Tensor, source: Source) -> bool:
    return source.key.shape[0] == 1 and source.indices is None and query.shape[0] > 1


def _sizes(query: Tensor, source: Source, entries: int) -> tuple[int, int, int, int]:
    """Return rows and entries of a tile, the number of splits and their size."""
    batch, heads, tokens, width = query.shape
    rows = (batch if _shared(query, source) else 1) * heads // _read_heads(source) * tokens
    block_rows = rows_of(rows)
    block = entries_of(source.key, max(width, source.value.shape[-1]))
    programs = -(-rows // block_rows) * _read_heads(source) * (1 if _shared(query, source) else batch)
    return block_rows, block, *splits_of(query.device, programs, entries, block)


def _launch(
    query: Tensor,
    source: Source,
    parts: Parts,
    first: int,
    entries: int,
    sizes: tuple[int, int, int, int],
    scaling: float,
    softcap: float | None,
) -> None:
    batch, heads, tokens, width = query.shape
    block_rows, block, splits, per_split = sizes
    key, value = inner_contiguous(source.key), inner_contiguous(source.value)
    read = _read_heads(source)
    folded = batch if _shared(query, source) else 1
    share = heads // read
    rows = folded * share * tokens
    kept, bias, sees = source.kept, source.bias, source.sees
    indices, counts = source.indices, source.counts
    if indices is not None:
        indices = indices.contiguous()
        if counts is None:
            counts = indices.new_full(indices.shape[:2], indices.shape[2])
        counts = counts.contiguous()
    stored = key.shape[2]
    # The interpreter multiplies bfloat16 wrongly, and float32 is exact only when asked for.
    upcast = interpreted() or query.dtype == torch.float32
    _partial[(-(-rows // block_rows), batch // folded * read, splits)](
        query, key, value,
        query if kept is None else kept.view(torch.uint8),
        query if bias is None else bias,
        query if sees is None else sees.contiguous().view(torch.uint8),
        query if indices is None else indices,
        query if counts is None else counts,
        query if source.limits is None else source.limits.contiguous(),
        parts.output, parts.weight,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *((0, 0, 0, 0) if kept is None else kept.stride()), *((0, 0, 0) if bias is None else bias.stride()),
        rows, share, tokens, read, read // key.shape[1],
        1 if kept is None else heads // kept.shape[1], 1 if bias is None else heads // bias.shape[1],
        entries, stored, stored - tokens if sees is not None else stored, per_split, first, parts.parts,
        scaling, 1.0 if softcap is None else softcap,
        D=width, V=parts.width, BR=block_rows, BN=block, BD=block_of(width), BV=block_of(parts.width),
        KEPT=kept is not None, BIAS=bias is not None, SEES=sees is not None, INDEXED=indices is not None,
        LIMITS=source.limits is not None, CAPPED=softcap is not None, UPCAST=upcast,
        num_warps=4, num_stages=2,
    )  # fmt: skip
