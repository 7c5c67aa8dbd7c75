"""CalibQuant: one bit for visual entries, inside a narrower range."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmfast.kv.base import Packed, Packer
from mmfast.kv.entries import Entries
from mmfast.kv.quantised import Quantised, Raw, Side, affine, check_bits, split
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, check_choice

_KEY_RANGE, _VALUE_RANGE = 0.5, 0.3
"""How much of a channel's range one bit spans, by the paper; from two bits on it is all of it."""


@register("calibquant", stage="cache", paper="arXiv 2502.14882", source="ActiveSky/calibquant", vectors=True)
@dataclass(frozen=True)
class CalibQuant(Packer):
    """Quantise visual entries to one bit per number, per channel; text stays as it is.

    With one bit the two codes would stand for the extremes of a channel, where hardly any number is; a
    narrower range is nearer to most of them. All visual entries of a block share the range of a channel.
    Generated entries stay as they are.

    Paper: "CalibQuant: 1-Bit KV Cache Quantization for Multimodal LLMs".

    Attributes:
        residual: newest entries that stay as they are.
        bits: 1, 2, 4 or 8.
        key_range: share of the range of keys that codes span; None = 0.5 for one bit, 1 for more.
        value_range: the same for values; None = 0.3 for one bit, 1 for more.
        per_channel: let each channel have its range; otherwise a block has one.
        compat: by default the range narrows towards the mean of a channel; ``"official"`` narrows it towards
            zero, as the official code does, so that channels of one sign lose their offset.
    """

    residual: int = 0
    bits: int = 1
    key_range: float | None = None
    value_range: float | None = None
    per_channel: bool = True
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits("bits", self.bits, [1, 2, 4, 8])
        check_choice("per_channel", self.per_channel, [False, True])
        check_choice("compat", self.compat, [None, "official"])
        for name in ("key_range", "value_range"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value!r} must be above 0 and at most 1, or None for the paper's: a share")

    def pack(self, states: Tensor, side: Side, entries: Entries | None) -> Packed:
        """Quantise the visual entries of a block."""
        if entries is None:
            return Raw.of(states)
        return split(states, entries.visual, lambda part: self.quantise(part, side), Raw.of)

    def quantise(self, states: Tensor, side: Side) -> Quantised:
        """Quantise ``[G, n, d]``, n being at least 1."""
        own, paper = (self.key_range, _KEY_RANGE) if side == "key" else (self.value_range, _VALUE_RANGE)
        share = own if own is not None else paper if self.bits == 1 else 1.0
        shared = (1,) if self.per_channel else (0, 1, 2)
        full = states.float()
        low, high = full.amin(dim=shared, keepdim=True), full.amax(dim=shared, keepdim=True)
        centre = 0 * low if self.compat == "official" else full.mean(dim=shared, keepdim=True)
        low, high = centre + share * (low - centre), centre + share * (high - centre)
        return affine(states, low, (high - low) / (2**self.bits - 1), 2**self.bits, 1, states.dtype)
