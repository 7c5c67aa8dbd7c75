"""VidKV: between one and two bits for the visual entries of videos."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.kernels.words import pack_codes, unpack_codes
from mmfast.kv.base import Packed, Packer, top_mask
from mmfast.kv.entries import Entries
from mmfast.kv.quantised import Raw, Side, affine, check_group, in_groups, minmax, split
from mmfast.registry import register

_ROWS = 64
"""How many of the last tokens of the prompt say which visual entries are salient."""


@register("vidkv", stage="cache", paper="arXiv 2503.16257", source="KD-TAO/VidKV")
@dataclass(frozen=True)
class VidKV(Packer):
    """Quantise the visual entries: keys to a mix of two bits and one, values to three levels.

    The channels of the keys with the largest range get two bits. The others get one bit after a Fourier
    transform along the tokens of each group; the mean of a group is stored apart. Values get -1, 0 or 1 times
    a size, around the mean of a group, per channel. Text and generated entries stay as they are.

    Paper: "Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models".

    Attributes:
        residual: newest entries that stay as they are.
        bits: bits of keys, from 1 to 2; ``bits - 1`` of the channels get two.
        group: neighbouring tokens that share a scale; the last group may be smaller.
        level: size of the values' levels, in mean magnitudes. The official code takes 1; from normal to
            two-sided exponential numbers the error is about least at 1.5.
        salient: share of the visual entries whose values get two bits: those to which the end of the prompt
            attends most.
    """

    residual: int = 0
    bits: float = 1.5
    group: int = 128
    level: float = 1.5
    salient: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group(self.group, 0)
        if not 1 <= self.bits <= 2:
            raise ValueError(f"bits={self.bits!r} must lie between 1 and 2: bits of a number in the keys")
        if not self.level > 0:
            raise ValueError(f"level={self.level!r} must be above 0: a multiple of the mean magnitude")
        if not 0 <= self.salient <= 1:
            raise ValueError(f"salient={self.salient!r} must lie between 0 and 1: a share of the visual entries")
        if self.salient:
            object.__setattr__(self, "needs", self.needs | {"attention"})
            object.__setattr__(self, "reads_question", True)

    def pack(self, states: Tensor, side: Side, entries: Entries | None) -> Packed:
        """Quantise the visual entries of a block."""
        if entries is None:
            return Raw.of(states)
        if side == "key":
            return split(states, entries.visual, self.quantise_keys, Raw.of)
        if not self.salient:
            return split(states, entries.visual, self.ternary, Raw.of)
        salient = self.salience(entries)[entries.visual]
        return split(
            states,
            entries.visual,
            lambda part: split(part, salient, lambda few: minmax(few, 4, self.group, 1), self.ternary),
            Raw.of,
        )

    def quantise_keys(self, keys: Tensor) -> Packed:
        """Quantise ``[G, n, d]`` to two bits in some channels and one in the others."""
        few = round((self.bits - 1) * keys.shape[2])
        if few in (0, keys.shape[2]):
            return minmax(keys, 4, self.group, 1) if few else self.spectrum(keys)
        wide = top_mask(keys.float().amax(dim=1) - keys.float().amin(dim=1), few)
        order = wide.sort(dim=-1, descending=True, stable=True).indices
        sorted_keys = keys.gather(2, order[:, None].expand(-1, keys.shape[1], -1))
        two_bits = minmax(sorted_keys[..., :few], 4, self.group, 1)
        return Channels(order.short(), two_bits, self.spectrum(sorted_keys[..., few:]))

    def spectrum(self, keys: Tensor) -> Packed:
        """Quantise the frequencies of ``[G, n, d]`` to one bit, each group of tokens for itself."""

        def pack(part: Tensor, grouped: Tensor) -> Packed:
            mean = grouped.mean(dim=2, keepdim=True).to(keys.dtype)
            waves = torch.view_as_real(torch.fft.rfft(grouped - mean.float(), dim=2, norm="ortho")[:, :, 1:])
            parts = waves.movedim(-1, 3).flatten(2, 3)
            size = parts.abs().mean(dim=2).nan_to_num().to(keys.dtype)
            words = pack_codes((parts >= 0).int().flatten(1, 2), 2, 1)
            return Spectrum(words, size, mean.squeeze(2), grouped.shape[2])

        return in_groups(keys, self.group, 1, pack)

    def ternary(self, values: Tensor) -> Packed:
        """Quantise ``[G, n, d]`` to three levels around the mean of each group of tokens, per channel."""

        def pack(part: Tensor, grouped: Tensor) -> Packed:
            mean = grouped.mean(dim=2)
            size = self.level * (grouped - mean.unsqueeze(2)).abs().mean(dim=2)
            return affine(part, mean - size, size, 3, 1, values.dtype)

        return in_groups(values, self.group, 1, pack)

    def salience(self, entries: Entries) -> Tensor:
        """Mark the visual entries to which the end of the prompt attends most, bool ``[n]``."""
        view = entries.view
        after = min(entries.after_media or 1, _ROWS, view.length)
        rows = view.rows(torch.arange(view.length - after, view.length, device=entries.keys.device))
        score = rows.mean(dim=(0, 1))[: len(entries)].masked_fill(~entries.visual, -torch.inf)
        return top_mask(score, int(self.salient * int(entries.visual.sum())))


@dataclass(frozen=True, eq=False)
class Channels(Packed):
    """Channels of two kinds, each kind stored in its own way.

    Attributes:
        order: int16 ``[G, d]``, which channel stands where: those of ``first``, then those of ``second``.
        first: block of some channels.
        second: block of the others.
    """

    order: Tensor
    first: Packed
    second: Packed

    def tensors(self) -> tuple[Tensor, ...]:
        """Return both blocks and the order."""
        return self.order, *self.first.tensors(), *self.second.tensors()

    def restore(self) -> Tensor:
        """Put the channels back into their order."""
        states = torch.cat([self.first.restore(), self.second.restore()], dim=2)
        places = self.order.long().argsort(dim=-1)
        return states.gather(2, places[:, None].expand_as(states))


@dataclass(frozen=True, eq=False)
class Spectrum(Packed):
    """A block by the frequencies along its tokens, of which only signs are stored.

    Attributes:
        words: int32, the signs of real and imaginary part of each frequency of each group but the lowest,
            packed along axis 1.
        size: ``[G, groups, d]`` what a sign stands for, in the dtype of the block.
        mean: ``[G, groups, d]``, in place of the lowest frequency.
        group: tokens in a group.
    """

    words: Tensor
    size: Tensor
    mean: Tensor
    group: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Return signs, sizes and means."""
        return self.words, self.size, self.mean

    def restore(self) -> Tensor:
        """Return to tokens."""
        groups, parts = self.size.shape[1], self.group // 2 * 2
        signs = unpack_codes(self.words, 2, 1, groups * parts).unflatten(1, (groups, parts)).float() * 2 - 1
        real, imaginary = (signs * self.size.float().unsqueeze(2)).unflatten(2, (parts // 2, 2)).unbind(3)
        # The lowest frequency is in front of the others, and in the mean.
        waves = functional.pad(torch.complex(real, imaginary), (0, 0, 1, 0))
        states = torch.fft.irfft(waves, n=self.group, dim=2, norm="ortho") + self.mean.float().unsqueeze(2)
        block: Tensor = states.flatten(1, 2).to(self.mean.dtype)
        return block
