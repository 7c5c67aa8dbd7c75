"""Eight-bit floats with one scale per token and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.kv.base import Packed, Packer
from mmfast.kv.entries import Entries
from mmfast.kv.packing.int8 import Scaled
from mmfast.kv.quantised import Side, usable
from mmfast.registry import register

_FORMAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FORMAT).max


@register("fp8", stage="cache")
@dataclass(frozen=True)
class Fp8(Packer):
    """Store keys and values as eight-bit floats, with one scale per token and head.

    The format has four bits of exponent and three of mantissa; the scale puts the largest magnitude at the end
    of its range. Small numbers of a token are kept more exactly than by integers, large ones less.

    Attributes:
        residual: newest entries that stay as they are.
    """

    def pack(self, states: Tensor, side: Side, entries: Entries | None) -> Packed:
        """Round a block to small floats."""
        scale = usable(states.float().abs().amax(dim=-1, keepdim=True) / _LARGEST, states.dtype)
        # Beyond the largest number the format has none: it would become NaN.
        codes = (states.float() / scale.float()).nan_to_num().clamp(-_LARGEST, _LARGEST)
        return Scaled(codes.to(_FORMAT), scale)
