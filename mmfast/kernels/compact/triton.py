"""Gathering in Triton: one launch for several tensors of any size and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens and channels of a tile. Copies are bound by memory: there is little to choose.
TOKENS, CHANNELS = 16, 128
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["batches", "count", "tokens"])
def _compact_kernel(
    indices,
    valid,
    sources,
    targets,
    strides,
    sizes,
    batches,
    count,
    tokens,
    VALID: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Copy one tile of one tensor; the tensors are laid out along the second axis of the grid."""
    for which in tl.static_range(len(sources)):
        if tl.program_id(1) == which:
            batch_stride, group_stride, token_stride = strides[which]
            groups, width = sizes[which]
            rest = tl.program_id(0).to(tl.int64)
            tiles = tl.cdiv(width, CHANNELS)
            channel = rest % tiles * CHANNELS + tl.arange(0, CHANNELS)
            rest = rest // tiles
            blocks = tl.cdiv(count, TOKENS)
            token = rest % blocks * TOKENS + tl.arange(0, TOKENS)
            rest = rest // blocks
            group = rest % groups
            batch = rest // groups
            # Smaller tensors need fewer programs than the largest.
            alive = token < tl.where(batch < batches, count, 0)
            index = tl.load(indices + batch * count + token, mask=alive, other=0)
            seen = alive & (index >= 0) & (index < tokens)
            if VALID:
                seen = seen & (tl.load(valid + batch * count + token, mask=alive, other=0) != 0)
            inside = (channel < width)[None, :]
            start = batch * batch_stride + group * group_stride + index * token_stride
            found = tl.load(sources[which] + start[:, None] + channel[None, :], mask=seen[:, None] & inside, other=0)
            stored = ((batch * groups + group) * count + token)[:, None] * width + channel[None, :]
            tl.store(targets[which] + stored, found, mask=alive[:, None] & inside)


def compact(indices: Tensor, tensors: Sequence[Tensor], valid: Tensor | None) -> list[Tensor]:
    """Gather; see the public function."""
    batch, count = indices.shape
    sources, targets, found, strides, sizes = [], [], [], [], []
    most, tokens = 0, min(tensor.shape[2 if tensor.ndim == 4 else 1] for tensor in tensors)
    for tensor in tensors:
        axis = 2 if tensor.ndim == 4 else 1
        made = torch.empty(
            (batch, *tensor.shape[1:axis], count, *tensor.shape[axis + 1 :]), dtype=tensor.dtype, device=tensor.device
        )
        found.append(made)
        if not made.numel():
            continue
        # [B, G, S, d] whatever it was; a row that all share has a stride of zero.
        whole = tensor[:, None] if tensor.ndim < 4 else tensor
        whole = whole[..., None] if tensor.ndim == 2 else whole
        whole = whole.expand(batch, -1, -1, -1)
        whole = whole if whole.shape[-1] == 1 or whole.stride(-1) == 1 else whole.contiguous()
        groups, _, width = whole.shape[1:]
        # What is only moved needs no type but a size.
        word = _WORDS[tensor.element_size()]
        sources.append(whole.view(word))
        targets.append(made.view(word))
        strides.append(tuple(whole.stride()[:3]))
        sizes.append((groups, width))
        most = max(most, triton.cdiv(width, CHANNELS) * triton.cdiv(count, TOKENS) * groups * batch)
    if not sources:
        return found
    with torch.cuda.device_of(indices):
        _compact_kernel[(most, len(sources))](
            indices.contiguous(),
            indices if valid is None else valid.contiguous().view(torch.uint8),
            tuple(sources),
            tuple(targets),
            tuple(strides),
            tuple(sizes),
            batch,
            count,
            tokens,
            VALID=valid is not None,
            TOKENS=TOKENS,
            CHANNELS=CHANNELS,
        )
    return found
