"""Codes instead of numbers: what the methods share that store keys and values in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from mmfast.kernels.words import Codes, joined, numbers_of, pack_codes, unpack_codes
from mmfast.kv.base import Packed

Side = Literal["key", "value"]
"""Whether a block holds keys or values."""


@dataclass(frozen=True, eq=False)
class Raw(Packed):
    """A block that stays as it is.

    Attributes:
        states: ``[G, n, d]``.
    """

    states: Tensor

    @staticmethod
    def of(states: Tensor) -> Raw:
        """Copy a block, so that what it was cut from can be freed.

        Example:
            >>> Raw.of(torch.ones(1, 2, 3)).restore().shape
            torch.Size([1, 2, 3])
        """
        return Raw(states.clone(memory_format=torch.contiguous_format))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the block."""
        return (self.states,)

    def restore(self) -> Tensor:
        """Return the block."""
        return self.states


@dataclass(frozen=True, eq=False)
class Quantised(Packed):
    """A block as codes; a code c of a group stands for ``c * scale + low``.

    Attributes:
        words: int32 codes, packed along ``axis``, see :func:`pack_codes`.
        scale: distance of two codes, of the block's shape but with one number per group along ``axis``;
            axes without differences may have size 1. Its dtype is the block's.
        low: what code 0 stands for, as ``scale``.
        levels: how many codes there are.
        axis: 1 where a group is made of tokens, 2 where it is made of channels.
        length: size of that axis.
    """

    words: Tensor
    scale: Tensor
    low: Tensor
    levels: int
    axis: int
    length: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Return codes, scales and offsets."""
        return self.words, self.scale, self.low

    def codes(self) -> Tensor:
        """Return the codes, int32 of the block's shape."""
        return unpack_codes(self.words, self.levels, self.axis, self.length)

    def restore(self) -> Tensor:
        """Return what the codes stand for."""
        return numbers_of(self.codes(), self.scale, self.low, self.axis)

    def readable(self) -> Codes | None:
        """Return the codes, if they are of 2, 4 or 8 bits."""
        if self.levels not in (4, 16, 256):
            return None
        shape = [*self.words.shape]
        shape[self.axis], shape[3 - self.axis] = self.scale.shape[self.axis], self.scale.shape[3 - self.axis]
        scale, low = (one.expand(shape)[None] for one in (self.scale, self.low))
        return Codes(self.words[None], scale, low, self.levels, self.axis + 1, self.length)


@dataclass(frozen=True, eq=False)
class Concatenated(Packed):
    """Blocks one after the other.

    Attributes:
        parts: the blocks.
        axis: 1 to join them along tokens, 2 along channels.
    """

    parts: Sequence[Packed]
    axis: int = 1

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what all of them store."""
        return tuple(tensor for part in self.parts for tensor in part.tensors())

    def readable(self) -> Codes | None:
        """Return the codes of all parts, if they follow each other."""
        found = [part.readable() for part in self.parts]
        codes = [one for one in found if one is not None]
        return joined(codes) if self.axis == 1 and len(codes) == len(found) else None

    def restore(self) -> Tensor:
        """Restore and join them."""
        return torch.cat([part.restore() for part in self.parts], dim=self.axis)


@dataclass(frozen=True, eq=False)
class Coded(Packed):
    """Blocks that were joined, in the form attention reads.

    Attributes:
        codes: of a batch of one.
    """

    codes: Codes

    def tensors(self) -> tuple[Tensor, ...]:
        """Return codes, scales and offsets."""
        codes = self.codes
        return tuple(one for one in (codes.words, codes.scale, codes.low) if one is not None)

    def readable(self) -> Codes | None:
        """Return the codes."""
        return self.codes

    def restore(self) -> Tensor:
        """Return what the codes stand for."""
        return self.codes.restore()[0]


@dataclass(frozen=True, eq=False)
class Split(Packed):
    """Two kinds of token of one block, each stored in its own way.

    Attributes:
        mask: bool ``[n]``, which tokens are of the first kind.
        first: block of these.
        second: block of the others.
    """

    mask: Tensor
    first: Packed
    second: Packed

    def tensors(self) -> tuple[Tensor, ...]:
        """Return both blocks and the mask."""
        return self.mask, *self.first.tensors(), *self.second.tensors()

    def restore(self) -> Tensor:
        """Put the tokens back into their order."""
        count = self.mask.cumsum(0)
        others = torch.arange(1, count.numel() + 1, device=count.device) - count
        places = torch.where(self.mask, count, count[-1] + others) - 1
        return torch.cat([self.first.restore(), self.second.restore()], dim=1).index_select(1, places)


@dataclass(frozen=True, eq=False)
class Patched(Packed):
    """A block of which some numbers are stored exactly.

    Attributes:
        inner: the block.
        places: ``[m]`` int32 places of these numbers in the flattened block.
        values: ``[m]`` the numbers.
    """

    inner: Packed
    places: Tensor
    values: Tensor

    @staticmethod
    def of(inner: Packed, states: Tensor, mask: Tensor) -> Patched:
        """Keep the numbers of ``states`` that ``mask`` marks, both of the block's shape.

        Example:
            >>> states = torch.tensor([[[1.0, 9.0]]])
            >>> Patched.of(Raw(torch.zeros(1, 1, 2)), states, states > 5).restore().tolist()
            [[[0.0, 9.0]]]
        """
        places = mask.flatten().nonzero().squeeze(-1)
        return Patched(inner, places.int(), states.flatten()[places])

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the block, and the exact numbers with their places."""
        return *self.inner.tensors(), self.places, self.values

    def restore(self) -> Tensor:
        """Restore the block and put the exact numbers in."""
        block = self.inner.restore()
        return block.flatten().scatter(0, self.places.long(), self.values).view(block.shape)


@dataclass(frozen=True, eq=False)
class Joined(Packed):
    """A block that was stored with the channels of all heads side by side.

    Attributes:
        inner: block ``[1, n, G * d]``.
        heads: G.
    """

    inner: Packed
    heads: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what the block stores."""
        return self.inner.tensors()

    def restore(self) -> Tensor:
        """Return the heads apart."""
        return rearrange(self.inner.restore(), "1 n (g d) -> g n d", g=self.heads)


def join_heads(states: Tensor) -> Tensor:
    """Lay the channels of all heads side by side: ``[G, n, d]`` to ``[1, n, G * d]``.

    Example:
        >>> join_heads(torch.tensor([[[1, 2]], [[3, 4]]])).tolist()
        [[[1, 2, 3, 4]]]
    """
    return rearrange(states, "g n d -> 1 n (g d)")


def split(
    states: Tensor, mask: Tensor, first: Callable[[Tensor], Packed], second: Callable[[Tensor], Packed]
) -> Packed:
    """Pack two kinds of token each in its own way.

    Args:
        states: ``[G, n, d]``.
        mask: bool ``[n]``, which tokens ``first`` packs; ``second`` packs the others.
        first: packs a block.
        second: packs a block.

    Example:
        >>> block = split(torch.arange(3.0).view(1, 3, 1), torch.tensor([False, True, False]), Raw.of, Raw.of)
        >>> block.restore().flatten().tolist()
        [0.0, 1.0, 2.0]
    """
    if not bool(mask.any()):
        return second(states)
    if bool(mask.all()):
        return first(states)
    return Split(mask, first(states[:, mask]), second(states[:, ~mask]))


def usable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round factors to the dtype in which they are stored; those that vanish become 1.

    Example:
        >>> usable(torch.tensor([0.0, 1e-30, 0.5]), torch.float16).tolist()
        [1.0, 1.0, 0.5]
    """
    rounded = scale.to(dtype)
    return rounded.masked_fill(rounded == 0, 1)


def affine(states: Tensor, low: Tensor, scale: Tensor, levels: int, axis: int, dtype: torch.dtype) -> Quantised:
    """Give each number the code nearest to it.

    Args:
        states: ``[G, n, d]``; float32 where it was computed.
        low: what code 0 stands for, one number per group, see :class:`Quantised`.
        scale: distance of two codes; 0 where a group is constant.
        levels: how many codes there are.
        axis: 1 or 2, along which groups lie; its size is a multiple of the number of groups.
        dtype: dtype of the block that is restored, and of what is stored of ``low`` and ``scale``.

    Example:
        >>> low, scale = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
        >>> affine(torch.tensor([[[0.0, 0.9, 2.1]]]), low, scale, 3, 2, torch.float32).restore().tolist()
        [[[0.0, 1.0, 2.0]]]
    """
    low, scale = low.to(dtype), usable(scale, dtype)
    length, groups, inner = states.shape[axis], low.shape[axis], axis + 1
    grouped = states.float().unflatten(axis, (groups, length // groups))
    digits = (grouped - low.float().unsqueeze(inner)) / scale.float().unsqueeze(inner)
    codes = digits.clamp(0, levels - 1).round().nan_to_num().int().flatten(axis, inner)
    return Quantised(pack_codes(codes, levels, axis), scale, low, levels, axis, length)


def in_groups(states: Tensor, group: int, axis: int, pack: Callable[[Tensor, Tensor], Packed]) -> Packed:
    """Pack groups of neighbours; the last may be smaller.

    Args:
        states: ``[G, n, d]``.
        group: size of a group.
        axis: 1 or 2, along which neighbours lie.
        pack: given states and the same as float32 with their groups in the extra axis ``axis + 1``.
    """
    length = states.shape[axis]
    full = length // group * group
    parts = [states.narrow(axis, 0, full)] * bool(full) + [states.narrow(axis, full, length - full)] * (full < length)
    if not parts:
        return Raw.of(states)
    packed = [pack(part, part.float().unflatten(axis, (-1, min(group, part.shape[axis])))) for part in parts]
    return packed[0] if len(packed) == 1 else Concatenated(packed, axis)


def minmax(states: Tensor, levels: int, group: int, axis: int, dtype: torch.dtype | None = None) -> Packed:
    """Spread the codes of each group evenly from its lowest to its highest number.

    Args:
        states: ``[G, n, d]``.
        levels: how many codes there are.
        group: neighbours that share a scale; the last group may be smaller.
        axis: 1 for groups of tokens in each channel, 2 for groups of channels of each token.
        dtype: dtype of the block that is restored; that of ``states`` when None.

    Example:
        >>> minmax(torch.tensor([[[0.0, 1.0, 2.9, 3.0]]]), 4, 4, 2).restore().tolist()
        [[[0.0, 1.0, 3.0, 3.0]]]
    """

    def pack(part: Tensor, grouped: Tensor) -> Packed:
        low, high = grouped.amin(axis + 1), grouped.amax(axis + 1)
        return affine(part, low, (high - low) / (levels - 1), levels, axis, dtype or states.dtype)

    return in_groups(states, group, axis, pack)


def token_groups(states: Tensor, levels: int, group: int, dtype: torch.dtype | None = None) -> Packed:
    """Quantise each channel in full groups of tokens; the tokens that fill none stay as they are.

    Args:
        states: ``[G, n, d]``.
        levels: how many codes there are.
        group: tokens in a group.
        dtype: dtype of the block that is restored; that of ``states`` when None.

    Example:
        >>> block = token_groups(torch.arange(5.0).view(1, 5, 1), 2, 2)
        >>> block.restore().flatten().tolist(), [tensor.shape[1] for tensor in block.tensors()]
        ([0.0, 1.0, 2.0, 3.0, 4.0], [1, 2, 2, 1])
    """
    full = states.shape[1] // group * group
    dtype = dtype or states.dtype
    rest = Raw.of(states[:, full:].to(dtype))
    if not full:
        return rest
    codes = minmax(states[:, :full], levels, group, 1, dtype)
    return codes if full == states.shape[1] else Concatenated([codes, rest])


def whole_chunks(loose: int, chunk: int) -> int:
    """Say how many of the oldest entries fill chunks of ``chunk``; all of them for a chunk of 0.

    Example:
        >>> whole_chunks(300, 128), whole_chunks(3, 0)
        (256, 3)
    """
    return loose // chunk * chunk if chunk else loose


def check_group(group: object, residual: int) -> None:
    """Refuse a size of groups that is no positive number, or of which the residual is no multiple.

    Raises:
        ValueError: naming the value.
    """
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ValueError(f"group={group!r} must be an int of at least 1: numbers that share a scale")
    if residual % group:
        raise ValueError(f"residual={residual!r} must be a multiple of group={group!r}, so that groups of tokens fill")


def check_bits(field_name: str, bits: object, legal: Sequence[int]) -> None:
    """Refuse numbers of bits for which there are no codes.

    Raises:
        ValueError: naming the field, the value and the legal ones.

    Example:
        >>> check_bits("bits", 4, [2, 4])
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in legal:
        raise ValueError(f"{field_name}={bits!r} must be one of {', '.join(map(str, legal))}: bits of a code")
