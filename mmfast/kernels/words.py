"""Codes in words of 32 bits, and the numbers they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import lcm

import torch
from torch import Tensor

_WORD = 32
"""Bits of the words in which codes are stored."""


@cache
def codes_per_word(levels: int) -> int:
    """Say how many codes a word of 32 bits holds.

    Example:
        >>> [codes_per_word(levels) for levels in (2, 3, 4, 8, 16, 256)]
        [32, 20, 16, 10, 8, 4]
    """
    count = 1
    while levels ** (count + 1) <= 1 << _WORD:
        count += 1
    return count


def pack_codes(codes: Tensor, levels: int, axis: int) -> Tensor:
    """Put neighbouring codes into words; the first is the lowest digit, the last word is filled with zeros.

    Args:
        codes: ints in ``[0, levels)``.
        levels: base of the digits; for a power of two they are groups of bits.
        axis: along which codes are neighbours.

    Returns:
        int32, with ``axis`` shorter by the codes in a word.

    Example:
        >>> pack_codes(torch.tensor([1, 2, 3]), 4, 0).tolist()
        [57]
        >>> pack_codes(torch.tensor([2, 1]), 3, 0).tolist()
        [5]
    """
    digits = codes_per_word(levels)
    missing = -codes.shape[axis] % digits
    if missing:
        shape = [missing if place == axis else size for place, size in enumerate(codes.shape)]
        codes = torch.cat([codes, codes.new_zeros(shape)], dim=axis)
    words: Tensor = codes.int().unflatten(axis, (codes.shape[axis] // digits, digits))
    # Sums of int32 wrap around, which is what the highest bit of a word needs.
    return (words * _weights(levels, codes, axis).int()).sum(dim=axis + 1, dtype=torch.int32)


def unpack_codes(words: Tensor, levels: int, axis: int, length: int) -> Tensor:
    """Undo :func:`pack_codes`.

    Args:
        words: int32.
        levels: base of the digits.
        axis: along which codes were packed.
        length: how many there are along it.

    Returns:
        int32 codes.

    Example:
        >>> unpack_codes(torch.tensor([57], dtype=torch.int32), 4, 0, 3).tolist()
        [1, 2, 3]
    """
    weights = _weights(levels, words, axis)
    if levels & (levels - 1) == 0:
        places = torch.arange(len(weights), device=words.device).int() * (levels.bit_length() - 1)
        codes = (words.unsqueeze(axis + 1) >> places.view(weights.shape)) & (levels - 1)
    else:
        unsigned = words.long() & ((1 << _WORD) - 1)
        codes = (unsigned.unsqueeze(axis + 1) // weights % levels).int()
    return codes.flatten(axis, axis + 1).narrow(axis, 0, length)


def _weights(levels: int, like: Tensor, axis: int) -> Tensor:
    """Return what each digit of a word counts, int64, shaped to stand behind ``axis`` of ``like``."""
    digits = torch.arange(codes_per_word(levels), device=like.device)
    return (levels**digits).view(-1, *[1] * (like.ndim - 1 - axis))


def numbers_of(codes: Tensor, scale: Tensor, low: Tensor | None, axis: int) -> Tensor:
    """Return what codes stand for: ``code * scale + low``.

    Args:
        codes: ints.
        scale: as codes, but with one number per group of neighbours along ``axis``; axes without differences may
            have size 1.
        low: as ``scale``; None = zero.
        axis: along which groups lie.

    Returns:
        Of the shape of the codes, in the dtype of ``scale``.

    Example:
        >>> numbers_of(torch.tensor([0, 1, 0, 1]), torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0]), 0).tolist()
        [0.0, 1.0, 5.0, 7.0]
    """
    groups, inner = scale.shape[axis], axis + 1
    found = codes.unflatten(axis, (groups, codes.shape[axis] // groups)).float() * scale.float().unsqueeze(inner)
    if low is not None:
        found = found + low.float().unsqueeze(inner)
    numbers: Tensor = found.flatten(axis, inner).to(scale.dtype)
    return numbers


@dataclass(frozen=True, eq=False)
class Codes:
    """Keys or values of a batch as codes of 2, 4 or 8 bits.

    Attributes:
        words: int32 codes ``[B, G, n, d]``, packed along ``axis``, see :func:`pack_codes`.
        scale: distance of two codes, ``[B, G, n, d]`` but with one number per group along ``axis``; the other of the
            last two axes may have size 1. Its dtype is that of the numbers.
        low: what code 0 stands for, as ``scale``; None = zero.
        levels: 4, 16 or 256: how many codes there are.
        axis: 2 where a group is made of tokens, 3 where it is made of channels.
        length: size of that axis, a multiple of the number of groups.
        signed: the codes are bytes from -128 to 127.
    """

    words: Tensor
    scale: Tensor
    low: Tensor | None
    levels: int
    axis: int
    length: int
    signed: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens n."""
        return self.length if self.axis == 2 else self.words.shape[2]

    @property
    def width(self) -> int:
        """Number of channels d."""
        return self.length if self.axis == 3 else self.words.shape[3]

    @property
    def group(self) -> int:
        """Size of a group."""
        return self.length // self.scale.shape[self.axis]

    @property
    def unit(self) -> int:
        """Smallest number of tokens at whose multiples the codes can be cut."""
        if self.axis == 3:
            return 1
        single = self.scale.shape[2] == 1
        return codes_per_word(self.levels) if single else lcm(codes_per_word(self.levels), self.group)

    def part(self, start: int, stop: int) -> Codes:
        """Return tokens from ``start``, a multiple of the unit, to ``stop``, another or the end."""
        if self.axis == 3:
            scale, low = (None if one is None else one[:, :, start:stop] for one in (self.scale, self.low))
            whole = self.scale.shape[2] == 1
            return replace(
                self,
                words=self.words[:, :, start:stop],
                scale=self.scale if whole or scale is None else scale,
                low=self.low if whole else low,
            )
        digits, group = codes_per_word(self.levels), self.group
        scale, low = self.scale, self.low
        if scale.shape[2] > 1:
            own = slice(start // group, -(-stop // group))
            scale, low = scale[:, :, own], None if low is None else low[:, :, own]
        words = self.words[:, :, start // digits : -(-stop // digits)]
        return replace(self, words=words, scale=scale, low=low, length=stop - start)

    def restore(self) -> Tensor:
        """Return the numbers ``[B, G, n, d]``."""
        codes = unpack_codes(self.words, self.levels, self.axis, self.length)
        return numbers_of((codes ^ 128) - 128 if self.signed else codes, self.scale, self.low, self.axis)


def joined(blocks: Sequence[Codes]) -> Codes | None:
    """Lay blocks one after the other; None where they do not fit together.

    Blocks of different codes or groups do not, nor does anything behind a block that ends within a word.

    Args:
        blocks: at least one, of the same batch and heads.

    Example:
        >>> words, scale = torch.zeros(1, 1, 3, 1, dtype=torch.int32), torch.ones(1, 1, 3, 1)
        >>> block = Codes(words, scale, None, 16, 3, 8)
        >>> joined([block, block]).tokens
        6
    """
    first = blocks[0]
    if len(blocks) == 1:
        return first
    kinds = {(one.levels, one.axis, one.signed, one.group, one.width, one.low is None) for one in blocks}
    shapes = {(one.words.shape[:2], one.scale.shape[:2], one.scale.shape[3], one.scale.dtype) for one in blocks}
    if len(kinds) > 1 or len(shapes) > 1:
        return None
    if first.axis == 2 and any(one.length % codes_per_word(one.levels) for one in blocks[:-1]):
        return None
    if first.axis == 3 and any(one.scale.shape[2] != one.tokens for one in blocks):
        return None
    lows = [one.low for one in blocks if one.low is not None]
    return replace(
        first,
        words=torch.cat([one.words for one in blocks], dim=2),
        scale=torch.cat([one.scale for one in blocks], dim=2),
        low=torch.cat(lows, dim=2) if lows else None,
        length=sum(one.length for one in blocks) if first.axis == 2 else first.length,
    )
