"""The attention of a vision encoder from its queries and keys, without ever holding all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BLOCK = 2**22
"""Logits held at a time."""


@dataclass(frozen=True)
class VisionAttention:
    """What one call of an attention function attends with.

    Attributes:
        query: ``[B, H, N, d]``.
        key: ``[B, G, N, d]`` with G dividing H.
        mask: None, ``[B, N]`` of the keys to see, or ``[B or 1, 1 or H, N, N]``, bool or to be added.
        scaling: factor of the logits; None = one over the root of d.
    """

    query: Tensor
    key: Tensor
    mask: Any = None
    scaling: float | None = None

    def split(self, lengths: Sequence[int]) -> Iterator[VisionAttention]:
        """Cut a packed sequence into parts that do not see each other."""
        if len(lengths) == 1:
            yield self
            return
        # Inside its part every token sees every other.
        for query, key in zip(self.query.split(list(lengths), 2), self.key.split(list(lengths), 2), strict=True):
            yield VisionAttention(query, key, None, self._scaling)

    def as_one_head(self) -> VisionAttention:
        """Read the projections as a single head of full width."""
        query, key = (joined_heads(states, "join")[:, None] for states in (self.query, self._keys))
        return VisionAttention(query, key, self.mask, self._scaling / self.query.shape[1] ** 0.5)

    @property
    def _scaling(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling

    @property
    def _keys(self) -> Tensor:
        groups = self.query.shape[1] // self.key.shape[1]
        return self.key if groups == 1 else self.key.repeat_interleave(groups, dim=1)

    def first_row(self, *, softmax: bool) -> Tensor:
        """Return what the first token, the class token, sees in all: float32 ``[B, H, N]``."""
        logits = self._logits(self._keys.float(), 0, 1)[:, :, 0]
        return logits.softmax(dim=-1) if softmax else logits

    def received(self, *, average: bool) -> Tensor:
        """Return the attention each token receives, the mean over the queries that may see it.

        Padding does not count among the queries. Work goes on in blocks of queries, so that memory
        stays bounded whatever the number of tokens.

        Args:
            average: take the mean over the heads, not the sum.

        Returns:
            float32 ``[B, N]``.

        Example:
            >>> same = VisionAttention(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
            >>> same.received(average=True).mul(3).tolist()
            [[1.0, 1.0, 1.0]]
        """
        batch, heads, count, _ = self.query.shape
        keys = self._keys.float()
        total = keys.new_zeros(batch, count)
        seen = keys.new_zeros(batch, count)
        step = max(1, _BLOCK // (batch * heads * count))
        for start in range(0, count, step):
            stop = min(count, start + step)
            attention = self._logits(keys, start, stop).softmax(dim=-1)
            visible = self._visible(start, stop)
            if visible is None:
                total += attention.sum(dim=(1, 2))
                seen += stop - start
            else:
                real = visible.diagonal(offset=start, dim1=-2, dim2=-1)[..., None]
                total += (attention * real).sum(dim=(1, 2))
                seen += (visible & real)[:, 0].sum(dim=1)
        received = total / seen.clamp_min(1)
        return received / heads if average else received

    def _logits(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """Return float32 ``[B, H, stop - start, N]``."""
        logits = (self.query[:, :, start:stop].float() * self._scaling) @ keys.transpose(-1, -2)
        mask = self._rows_of_mask(start, stop)
        if mask is None:
            return logits
        if mask.dtype == torch.bool:
            return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        return logits + mask

    def _rows_of_mask(self, start: int, stop: int) -> Tensor | None:
        if self.mask is None:
            return None
        if self.mask.ndim == 2:
            keys: Tensor = self.mask.bool()[:, None, None, :].expand(-1, -1, stop - start, -1)
            return keys
        rows: Tensor = self.mask[:, :, start:stop]
        return rows

    def _visible(self, start: int, stop: int) -> Tensor | None:
        """Return bool ``[B or 1, 1 or H, stop - start, N]``; None = everything."""
        rows = self._rows_of_mask(start, stop)
        if rows is None or rows.dtype == torch.bool:
            return rows
        return rows > torch.finfo(rows.dtype).min / 2


def joined_heads(states: Tensor, heads: str) -> Tensor:
    """Average, add up or join the heads.

    Args:
        states: ``[B, H, N, d]``.
        heads: ``"mean"``, ``"sum"`` or ``"join"``.

    Returns:
        ``[B, N, d]``, joined ``[B, N, H * d]``.

    Example:
        >>> joined_heads(torch.ones(1, 2, 3, 4), "sum")[0, 0].tolist()
        [2.0, 2.0, 2.0, 2.0]
    """
    if heads == "join":
        return states.transpose(1, 2).flatten(2)
    return states.sum(dim=1) if heads == "sum" else states.mean(dim=1)
