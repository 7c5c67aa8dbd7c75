"""KIVI: keys per channel and values per token, in few bits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmfast.kv.base import Packed, Packer
from mmfast.kv.entries import Entries
from mmfast.kv.quantised import Side, check_bits, check_group, minmax, split, token_groups, whole_chunks
from mmfast.registry import register
from mmfast.token_pruning.base import check_choice


@register("kivi", stage="cache", paper="arXiv 2402.02750", source="jy-yuan/KIVI", vectors=True)
@dataclass(frozen=True)
class Kivi(Packer):
    """Quantise keys per channel and values per token.

    Keys share a scale along tokens, because some of their channels are large in every token; values along
    channels. Keys are packed as soon as ``residual`` of them are loose, so that groups of tokens fill; of the
    values exactly the newest ``residual`` stay as they are. Tokens of a block that fill no group are stored
    exactly. Keys are stored as the model caches them, after the position embedding.

    Paper: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache".

    Attributes:
        residual: entries that may stay as they are; a multiple of ``group``.
        bits: 2, 4 or 8; where few key/value heads serve many query heads, 2 costs accuracy.
        group: neighbours that share a scale and an offset.
        visual_bits: other bits for the visual entries of the prompt; None = the same.
        values_per_channel: quantise the values of visual entries per channel too; better at 2 bits.
    """

    bits: int = 4
    group: int = 32
    visual_bits: int | None = None
    values_per_channel: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits("bits", self.bits, [2, 4, 8])
        if self.visual_bits is not None:
            check_bits("visual_bits", self.visual_bits, [2, 4, 8])
        check_choice("values_per_channel", self.values_per_channel, [False, True])
        check_group(self.group, self.residual)

    def due(self, loose: int, side: Side) -> int:
        """Pack keys ``residual`` at a time, and values as soon as ``residual`` newer ones are there."""
        return whole_chunks(loose, self.residual or self.group) if side == "key" else super().due(loose, side)

    def pack(self, states: Tensor, side: Side, entries: Entries | None) -> Packed:
        """Quantise a block, its visual entries apart where they are treated differently."""
        if entries is None or not (self.visual_bits or (self.values_per_channel and side == "value")):
            return self.quantise(states, self.bits, per_channel=side == "key")
        bits = self.visual_bits or self.bits
        return split(
            states,
            entries.visual,
            lambda part: self.quantise(part, bits, per_channel=side == "key" or self.values_per_channel),
            lambda part: self.quantise(part, self.bits, per_channel=side == "key"),
        )

    def quantise(self, states: Tensor, bits: int, *, per_channel: bool) -> Packed:
        """Quantise ``[G, n, d]`` with groups of tokens in each channel, or of channels in each token."""
        if per_channel:
            return token_groups(states, 2**bits, self.group)
        return minmax(states, 2**bits, self.group, axis=2)
