"""Triton: codes are read as they are stored and turned into numbers in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.dispatch import interpreted
from mmfast.kernels.parts import nothing
from mmfast.kernels.split_attention import (
    Parts,
    block_of,
    capped,
    entries_of,
    inner_contiguous,
    online,
    rows_of,
    splits_of,
    write,
)
from mmfast.kernels.words import Codes


@triton.jit
def _read(
    words, scale, low, loose,
    w_n, w_c, s_n, s_c, l_n,
    group, packed, place, needed,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, BY_TOKEN: tl.constexpr, LOW: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """Return entries ``[N, PADDED]`` as numbers, whichever way they are stored; BITS 0 = all are loose."""
    column = tl.arange(0, PADDED)
    inside = needed[:, None] & (column < WIDTH)[None, :]
    fresh = inside & (place >= packed)[:, None]
    states = tl.load(loose + (place - packed)[:, None] * l_n + column[None, :], mask=fresh, other=0.0)
    if BITS > 0:
        old = inside & (place < packed)[:, None]
        digits: tl.constexpr = 32 // BITS
        # Codes in groups of channels are packed along channels, others along tokens.
        if BY_TOKEN:
            word = (column // digits)[None, :] * w_c + place[:, None] * w_n
            shift = ((column % digits) * BITS)[None, :]
            factor = place[:, None] * s_n + (column // group)[None, :] * s_c
        else:
            word = (place // digits)[:, None] * w_n + column[None, :] * w_c
            shift = ((place % digits) * BITS).to(tl.int32)[:, None]
            factor = (place // group)[:, None] * s_n + column[None, :] * s_c
        code = (tl.load(words + word, mask=old, other=0) >> shift) & ((1 << BITS) - 1)
        if SIGNED:
            code = (code ^ 128) - 128
        number = code.to(tl.float32) * tl.load(scale + factor, mask=old, other=0.0).to(tl.float32)
        if LOW:
            number += tl.load(low + factor, mask=old, other=0.0).to(tl.float32)
        states = tl.where(old, number.to(states.dtype), states)
    return states


_VARIABLE = ["tokens", "entries", "per_split", "parts", "k_packed", "v_packed", "k_group", "v_group"]
_VARIABLE += ["m_b", "m_h", "m_t", "b_b", "b_h", "ks_b", "ks_g", "vs_b", "vs_g"]
"""What changes from step to step, and the strides that do; specialised on it, kernels would be compiled anew."""


@triton.jit(do_not_specialize=_VARIABLE)
def _codes(
    query, k_words, k_scale, k_low, k_loose,
    v_words, v_scale, v_low, v_loose,
    visible, bias, output, weight,
    q_b, q_h, q_t,
    kw_b, kw_g, kw_n, kw_c,
    ks_b, ks_g, ks_n, ks_c,
    kl_b, kl_g, kl_n,
    vw_b, vw_g, vw_n, vw_c,
    vs_b, vs_g, vs_n, vs_c,
    vl_b, vl_g, vl_n,
    m_b, m_h, m_t, m_n, b_b, b_h, b_n,
    tokens, groups, share, m_per, b_per,
    k_group, k_packed, v_group, v_packed,
    entries, per_split, parts, scaling, softcap,
    D: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    K_BITS: tl.constexpr, K_BY_TOKEN: tl.constexpr, K_LOW: tl.constexpr, K_SIGNED: tl.constexpr,
    V_BITS: tl.constexpr, V_BY_TOKEN: tl.constexpr, V_LOW: tl.constexpr, V_SIGNED: tl.constexpr,
    MASKED: tl.constexpr, BIAS: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attend from the rows of one group of heads to one split of the entries."""
    pair = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    batch, group = pair // groups, pair % groups
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    live = row < share * tokens
    head, token = group * share + row // tokens, row % tokens
    width = tl.arange(0, BD)
    q = tl.load(
        query + batch * q_b + (head * q_h + token * q_t)[:, None] + width[None, :],
        mask=live[:, None] & (width < D)[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    acc = tl.zeros([BR, BV], tl.float32)
    top = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    begin = split * per_split
    end = tl.minimum(begin + per_split, entries)
    for start in range(begin, end, BN):
        slot = start + tl.arange(0, BN)
        place = slot.to(tl.int64)
        seen = live[:, None] & (slot < end)[None, :]
        if MASKED:
            line = batch * m_b + (head // m_per) * m_h + token * m_t
            seen = seen & (tl.load(visible + line[:, None] + place[None, :] * m_n, mask=seen, other=0) != 0)
        needed = tl.max(seen.to(tl.int32), 0) > 0
        k = _read(
            k_words + batch * kw_b + group * kw_g, k_scale + batch * ks_b + group * ks_g,
            k_low + batch * ks_b + group * ks_g, k_loose + batch * kl_b + group * kl_g,
            kw_n, kw_c, ks_n, ks_c, kl_n, k_group, k_packed, place, needed, D, BD, K_BITS, K_BY_TOKEN, K_LOW, K_SIGNED,
        )  # fmt: skip
        v = _read(
            v_words + batch * vw_b + group * vw_g, v_scale + batch * vs_b + group * vs_g,
            v_low + batch * vs_b + group * vs_g, v_loose + batch * vl_b + group * vl_g,
            vw_n, vw_c, vs_n, vs_c, vl_n, v_group, v_packed, place, needed, V, BV, V_BITS, V_BY_TOKEN, V_LOW, V_SIGNED,
        )  # fmt: skip
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if CAPPED:
            logits = capped(logits, softcap)
        if BIAS:
            line = batch * b_b + (head // b_per) * b_h
            logits += tl.load(bias + line[:, None] + place[None, :] * b_n, mask=seen, other=0.0).to(tl.float32)
        acc, top, total = online(acc, top, total, tl.where(seen, logits, float("-inf")), v)
    written = ((batch * groups * share + head) * tokens + token) * parts + split
    write(acc, top, total, output, weight, written, live, V, BV)


def attend_codes(
    query: Tensor,
    key: Codes | None,
    value: Codes | None,
    loose_key: Tensor,
    loose_value: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    *,
    scaling: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend to codes and what follows; arguments as of the reference."""
    batch, heads, tokens, width = query.shape
    groups, own = loose_key.shape[1], loose_value.shape[3]
    entries = loose_key.shape[2] + (0 if key is None else key.tokens)
    if not entries or not query.numel():
        output, weight = nothing(query, own)
        return output.to(query.dtype), weight
    query, loose_key, loose_value = (inner_contiguous(one) for one in (query, loose_key, loose_value))
    share = heads // groups
    # Codes, factors and loose entries of a block are under way at once: half of what plain numbers take.
    block_rows, block = rows_of(share * tokens), max(16, entries_of(loose_key, max(width, own)) // 2)
    tiles = -(-share * tokens // block_rows)
    splits, per_split = splits_of(query.device, tiles * batch * groups, entries, block)
    if visible is not None:
        visible = visible.expand(-1, -1, tokens, -1)
    sides = (_side(key, loose_key), _side(value, loose_value))
    with torch.cuda.device_of(query):
        parts = Parts(query, own, splits)
        _codes[(tiles, batch * groups, splits)](
            query, *sides[0][0], *sides[1][0],
            query if visible is None else visible.view(torch.uint8), query if bias is None else bias,
            parts.output, parts.weight,
            *query.stride()[:3], *sides[0][1], *sides[1][1],
            *((0, 0, 0, 0) if visible is None else visible.stride()), *((0, 0, 0) if bias is None else bias.stride()),
            tokens, groups, share,
            1 if visible is None else heads // visible.shape[1], 1 if bias is None else heads // bias.shape[1],
            *sides[0][2], *sides[1][2], entries, per_split, splits,
            width**-0.5 if scaling is None else scaling, 1.0 if softcap is None else softcap,
            D=width, V=own, BR=block_rows, BN=block, BD=block_of(width), BV=block_of(own),
            **_flags("K", key), **_flags("V", value),
            MASKED=visible is not None, BIAS=bias is not None, CAPPED=softcap is not None,
            UPCAST=interpreted() or query.dtype == torch.float32,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        return parts.merged()


def _side(codes: Codes | None, loose: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, int]]:
    """Return the tensors of keys or values, their strides, and the size of a group with the number packed."""
    if codes is None:
        return (loose, loose, loose, loose), (0,) * 8 + loose.stride()[:3], (1, 0)
    scale = codes.scale
    low = scale if codes.low is None else codes.low
    if low.stride() != scale.stride():
        scale, low = scale.contiguous(), low.contiguous()
    # A factor that stands for a whole axis is read again and again.
    shape = [*scale.shape]
    shape[5 - codes.axis] = codes.words.shape[5 - codes.axis]
    strides = (*codes.words.stride(), *scale.expand(shape).stride(), *loose.stride()[:3])
    return (codes.words, scale, low, loose), strides, (codes.group, codes.tokens)


def _flags(side: str, codes: Codes | None) -> dict[str, int | bool]:
    return {
        f"{side}_BITS": 0 if codes is None or not codes.tokens else codes.levels.bit_length() - 1,
        f"{side}_BY_TOKEN": codes is not None and codes.axis == 3,
        f"{side}_LOW": codes is not None and codes.low is not None,
        f"{side}_SIGNED": codes is not None and codes.signed,
    }
