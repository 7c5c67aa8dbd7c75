"""Mustafar: only the larger numbers of each key and value are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import Packed, Packer
from mmfast.kv.entries import Entries
from mmfast.kv.quantised import Side
from mmfast.registry import register

_BYTE = 8


@register("mustafar", stage="cache", paper="arXiv 2505.22913", source="dhjoo98/mustafar", vectors=True)
@dataclass(frozen=True)
class Mustafar(Packer):
    """Store only the numbers of largest magnitude of each token and head, and a bitmap of their places.

    As in the official code the number at the threshold survives, so that one more is stored than ``sparsity``
    says, and so do all that are equally large. The official kernel also pads the numbers of 64 channels to a
    multiple of 8 and stores where each such tile begins; here they follow each other without gaps.

    Paper: "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference".

    Attributes:
        residual: newest entries that stay as they are.
        sparsity: share of the channels that become zero, per token and head.
    """

    sparsity: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity!r} must be at least 0 and below 1: a share of the channels")

    def pack(self, states: Tensor, side: Side, entries: Entries | None) -> Packed:
        """Take out the larger numbers of a block."""
        large = self.survivors(states)
        return Sparse(pack_bits(large), states[large], states.shape[-1])

    def survivors(self, states: Tensor) -> Tensor:
        """Mark what is stored of ``[G, n, d]``, bool of the same shape."""
        size = states.float().abs()
        rank = max(1, int(self.sparsity * states.shape[-1]))
        return size >= size.sort(dim=-1).values[..., rank - 1 : rank]


@dataclass(frozen=True, eq=False)
class Sparse(Packed):
    """A block of which only some numbers are not zero.

    Attributes:
        bitmap: uint8 ``[G, n, ceil(d / 8)]``, which they are.
        values: ``[m]`` the numbers, in the order of the block.
        width: d.
    """

    bitmap: Tensor
    values: Tensor
    width: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Return bitmap and numbers."""
        return self.bitmap, self.values

    def restore(self) -> Tensor:
        """Put the numbers back into their places."""
        mask = unpack_bits(self.bitmap, self.width)
        return self.values.new_zeros(mask.shape).masked_scatter(mask, self.values)


def pack_bits(mask: Tensor) -> Tensor:
    """Put eight flags into a byte, the first into its lowest bit.

    Args:
        mask: bool ``[..., d]``.

    Returns:
        uint8 ``[..., ceil(d / 8)]``.

    Example:
        >>> pack_bits(torch.tensor([True, False, True])).tolist()
        [5]
    """
    filled = functional.pad(mask.int(), (0, -mask.shape[-1] % _BYTE))
    flags: Tensor = filled.unflatten(-1, (filled.shape[-1] // _BYTE, _BYTE))
    return (flags << torch.arange(_BYTE, device=mask.device)).sum(dim=-1).to(torch.uint8)


def unpack_bits(bitmap: Tensor, width: int) -> Tensor:
    """Undo :func:`pack_bits`.

    Args:
        bitmap: uint8 ``[..., ceil(d / 8)]``.
        width: d.

    Returns:
        bool ``[..., d]``.

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), 3).tolist()
        [True, False, True]
    """
    flags = bitmap.int()[..., None] >> torch.arange(_BYTE, device=bitmap.device) & 1
    return flags.flatten(-2)[..., :width].bool()
