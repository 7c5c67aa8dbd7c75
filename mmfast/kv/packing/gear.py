"""GEAR: few bits, with the error made good by a low-rank matrix and exact outliers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.kv.base import Packed, Packer
from mmfast.kv.entries import Entries
from mmfast.kv.quantised import (
    Joined,
    Patched,
    Raw,
    Side,
    check_bits,
    check_group,
    join_heads,
    minmax,
    token_groups,
    whole_chunks,
)
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, check_choice


@register("gear", stage="cache", paper="arXiv 2403.05527", source="HaoKang-Timmy/GEAR", vectors=True)
@dataclass(frozen=True)
class Gear(Packer):
    """Quantise, and store a low-rank picture of the error and the outliers beside it.

    Outliers are the smallest and largest numbers of each token (values, over the channels of all heads) or of
    each channel (keys, over the tokens of a block); the mean stands in for them while the rest is quantised
    per token or per channel. The error of each head is then approximated by power iteration. Both keys and
    values are packed ``residual`` at a time, because a low-rank matrix for single tokens saves nothing.

    Paper: "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM".

    Attributes:
        residual: entries that are packed together; a multiple of ``group``.
        bits: 2, 4 or 8.
        group: neighbours that share a scale and an offset.
        sparsity: share of the numbers that are stored exactly, as outliers.
        rank: rank of the matrix that stands for the error; less for blocks that are smaller.
        loop: rounds of power iteration.
        seed: seed of the random matrix with which the iteration starts.
        compat: by default ``sparsity`` is the share of outliers in each channel of keys; ``"official"`` makes
            them as many as in a token of values, whatever the number of tokens, as the official code does.
    """

    residual: int = 64
    bits: int = 2
    group: int = 64
    sparsity: float = 0.02
    rank: int = 4
    loop: int = 3
    seed: int = 0
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits("bits", self.bits, [2, 4, 8])
        check_group(self.group, self.residual)
        check_choice("compat", self.compat, [None, "official"])
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity={self.sparsity!r} must lie between 0 and 1: a share of the numbers")
        for name, least in (("rank", 0), ("loop", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an int of at least {least}")

    def due(self, loose: int, side: Side) -> int:
        """Pack ``residual`` entries at a time."""
        return whole_chunks(loose, self.residual or self.group)

    def pack(self, states: Tensor, side: Side, entries: Entries | None) -> Packed:
        """Quantise a block and approximate the error."""
        if states.shape[1] < (self.group if side == "key" else 1):
            return Raw.of(states)
        quantised = self.quantise(states, side)
        rank = min(self.rank, *states.shape[1:])
        if not rank:
            return quantised
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.rand(states.shape[0], states.shape[2], rank, generator=generator).to(states.device)
        return self.corrected(states, quantised, start)

    def quantise(self, states: Tensor, side: Side) -> Packed:
        """Quantise ``[G, n, d]``, outliers being exact; tokens that fill no group of keys are exact too."""
        wide, axis = join_heads(states), 1 if side == "key" else 2
        length = wide.shape[axis]
        outliers = self.outliers_per_side(wide, side)
        order = wide.float().sort(dim=axis, stable=True).indices
        ends = [order.narrow(axis, 0, outliers), order.narrow(axis, length - outliers, outliers)]
        mask = torch.zeros_like(wide, dtype=torch.bool).scatter(axis, torch.cat(ends, dim=axis), True)
        plain = torch.where(mask, wide.float().mean(dim=axis, keepdim=True), wide.float())
        if side == "key":
            inner = token_groups(plain, 2**self.bits, self.group, states.dtype)
        else:
            inner = minmax(plain, 2**self.bits, self.group, 2, states.dtype)
        return Joined(Patched.of(inner, wide, mask), states.shape[0])

    def outliers_per_side(self, wide: Tensor, side: Side) -> int:
        """Say how many of the smallest, and as many of the largest, numbers are stored exactly.

        Args:
            wide: ``[1, n, G * d]``.
            side: keys are counted per channel, values per token.
        """
        _, tokens, channels = wide.shape
        if side == "key" and self.compat is None:
            return int(self.sparsity * tokens / 2)
        count = int(int(tokens * channels * self.sparsity) / tokens / 2)
        return min(count, (tokens if side == "key" else channels) // 2)

    def corrected(self, states: Tensor, quantised: Packed, start: Tensor) -> Corrected:
        """Approximate what a quantised block lacks.

        Args:
            states: ``[G, n, d]``.
            quantised: the same block, quantised.
            start: float32 ``[G, d, r]`` matrix with which the iteration starts; r is at most n and d.
        """
        error = states.float() - quantised.restore().float()
        channels = start
        for _ in range(self.loop):
            # Only the last round has to be orthogonal; but powers of the error would soon leave float32.
            tokens = torch.linalg.qr(error @ torch.linalg.qr(channels).Q).Q
            channels = error.mT @ tokens
        return Corrected(quantised, tokens.to(states.dtype), channels.to(states.dtype))


@dataclass(frozen=True, eq=False)
class Corrected(Packed):
    """A quantised block and a low-rank matrix that is added to it.

    Attributes:
        inner: the block.
        tokens: ``[G, n, r]`` left factor.
        channels: ``[G, d, r]`` right factor.
    """

    inner: Packed
    tokens: Tensor
    channels: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the block and both factors."""
        return *self.inner.tensors(), self.tokens, self.channels

    def correction(self) -> Tensor:
        """Return the low-rank matrix, float32 ``[G, n, d]``."""
        return self.tokens.float() @ self.channels.float().mT

    def restore(self) -> Tensor:
        """Return block and correction added up."""
        block = self.inner.restore()
        return (block.float() + self.correction()).to(block.dtype)
