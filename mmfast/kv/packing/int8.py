"""Eight-bit integers with one scale per token and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.kernels.words import Codes, codes_per_word
from mmfast.kv.base import Packed, Packer
from mmfast.kv.entries import Entries
from mmfast.kv.quantised import Side, usable
from mmfast.registry import register

_LARGEST = 127
_LEVELS = 256


@register("int8", stage="cache")
@dataclass(frozen=True)
class Int8(Packer):
    """Store keys and values as eight-bit integers, with one scale per token and head.

    The scale makes 127 of the largest magnitude, so that zero stays zero. Entries are independent of each
    other, and each is packed once.

    Attributes:
        residual: newest entries that stay as they are.
    """

    def pack(self, states: Tensor, side: Side, entries: Entries | None) -> Packed:
        """Round a block to integers."""
        scale = usable(states.float().abs().amax(dim=-1, keepdim=True) / _LARGEST, states.dtype)
        codes = (states.float() / scale.float()).round().nan_to_num().clamp(-_LARGEST, _LARGEST)
        return Scaled(codes.to(torch.int8), scale)


@dataclass(frozen=True, eq=False)
class Scaled(Packed):
    """A block in a small number format, with one factor per token and head.

    Attributes:
        codes: ``[G, n, d]`` in that format.
        scale: ``[G, n, 1]`` in the dtype of the block.
    """

    codes: Tensor
    scale: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return codes and factors."""
        return self.codes, self.scale

    def readable(self) -> Codes | None:
        """Return integers as the words they lie in; where these end with a token."""
        width = self.codes.shape[2]
        if self.codes.dtype != torch.int8 or width % codes_per_word(_LEVELS):
            return None
        return Codes(self.codes[None].view(torch.int32), self.scale[None], None, _LEVELS, 3, width, signed=True)

    def restore(self) -> Tensor:
        """Return codes times factors."""
        return (self.codes.float() * self.scale.float()).to(self.scale.dtype)
