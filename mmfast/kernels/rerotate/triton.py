"""Rotation in Triton: keys are read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile of one half of the channels. Bound by memory: there is little to choose.
TILE = 2048


@triton.jit
def _halves(table, batch_stride, row_stride, batch, row, seen, HALF: tl.constexpr, PADDED: tl.constexpr):
    """Load both halves of some rows of cosines or sines, in float32."""
    channel = tl.arange(0, PADDED)
    start = (table + batch * batch_stride + row * row_stride)[:, None] + channel[None, :]
    first = tl.load(start, mask=seen, other=0.0).to(tl.float32)
    return first, tl.load(start + HALF, mask=seen, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count", "positions"])
def _rerotate_kernel(
    keys,
    keys_batch,
    keys_group,
    keys_row,
    old_cos,
    old_sin,
    old_batch,
    old_row,
    new_cos,
    new_sin,
    new_batch,
    new_row,
    places,
    places_batch,
    places_group,
    places_row,
    found,
    count,
    positions,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    PLACED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Turn some keys of one head."""
    batch = tl.program_id(1).to(tl.int64) // GROUPS
    group = tl.program_id(1).to(tl.int64) % GROUPS
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = row < count
    place = row
    if PLACED:
        place = tl.load(places + batch * places_batch + group * places_group + row * places_row, mask=alive, other=0)
    channel = tl.arange(0, PADDED)
    seen = alive[:, None] & (channel < HALF)[None, :]
    known = seen & ((place >= 0) & (place < positions))[:, None]
    cos_first, cos_second = _halves(old_cos, old_batch, old_row, batch, row, seen, HALF, PADDED)
    sin_first, sin_second = _halves(old_sin, old_batch, old_row, batch, row, seen, HALF, PADDED)
    start = (keys + batch * keys_batch + group * keys_group + row * keys_row)[:, None]
    first = tl.load(start + channel[None, :], mask=seen, other=0.0).to(tl.float32)
    second = tl.load(start + channel[None, :] + HALF, mask=seen, other=0.0).to(tl.float32)
    # What lies outside has no length to divide by.
    length_first = tl.where(seen, cos_first * cos_first + sin_first * sin_first, 1.0)
    length_second = tl.where(seen, cos_second * cos_second + sin_second * sin_second, 1.0)
    back_first = first * (cos_first / length_first) + second * (sin_first / length_first)
    back_second = second * (cos_second / length_second) - first * (sin_second / length_second)
    cos_first, cos_second = _halves(new_cos, new_batch, new_row, batch, place, known, HALF, PADDED)
    sin_first, sin_second = _halves(new_sin, new_batch, new_row, batch, place, known, HALF, PADDED)
    target = found + ((tl.program_id(1).to(tl.int64) * count + row) * WIDTH)[:, None]
    tl.store(target + channel[None, :], back_first * cos_first - back_second * sin_first, mask=seen)
    tl.store(target + channel[None, :] + HALF, back_second * cos_second + back_first * sin_second, mask=seen)
    if WIDTH > 2 * HALF:
        more = 2 * HALF + tl.arange(0, REST)
        seen = alive[:, None] & (more < WIDTH)[None, :]
        tl.store(target + more[None, :], tl.load(start + more[None, :], mask=seen, other=0.0), mask=seen)


def rerotate(keys: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], places: Tensor | None) -> Tensor:
    """Turn; see the public function. ``places`` is ``[B, G, n]``, possibly expanded."""
    batch, groups, count, width = keys.shape
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    tables = [table.contiguous() for table in (*old, *new)]
    half = int(tables[0].shape[-1]) // 2
    padded = max(16, triton.next_power_of_2(half))
    rows = max(1, TILE // padded)
    shared = [0 if table.ndim == 2 or table.shape[0] == 1 else table.stride(0) for table in tables]
    strides = (0, 0, 0) if places is None else places.stride()
    found = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)
    with torch.cuda.device_of(keys):
        _rerotate_kernel[(triton.cdiv(count, rows), batch * groups)](
            keys,
            *keys.stride()[:3],
            tables[0],
            tables[1],
            shared[0],
            2 * half,
            tables[2],
            tables[3],
            shared[2],
            2 * half,
            keys if places is None else places,
            *strides,
            found,
            count,
            int(tables[2].shape[-2]),
            GROUPS=groups,
            HALF=half,
            PADDED=padded,
            WIDTH=width,
            REST=triton.next_power_of_2(max(1, width - 2 * half)),
            PLACED=places is not None,
            ROWS=rows,
        )
    return found
