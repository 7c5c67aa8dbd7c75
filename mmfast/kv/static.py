"""Keys and values in buffers of a fixed size at a fixed place, for caches that are not to move while they grow."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmfast.kv.cache import LogicalLength

STEP = 64
"""Buffers are as long as what they must hold, rounded up to a multiple of this, so that few lengths occur."""

_Side = Literal["keys", "values"]
_SIDES: tuple[_Side, ...] = ("keys", "values")


def rounded(entries: int) -> int:
    """Return the length of a buffer for so many entries.

    Example:
        >>> rounded(1), rounded(64), rounded(65)
        (64, 64, 128)
    """
    return -(-entries // STEP) * STEP


class FixedStates(LogicalLength):
    """Mixin of a logical layer: once its prompt is settled, what it stores stands in buffers that stay in place.

    A prompt is read into tensors of its own, so that nothing is larger than it must be while tokens are still
    dropped. :meth:`settle` moves what is left into a buffer with room for what may still come. ``keys`` and
    ``values`` are views of the part of it that is filled. Only what does not fit, or another number of rows,
    makes a new buffer.

    Attributes:
        limit: logical tokens the cache is made for.
        filled: int64 ``[1]``, the number of entries in the buffers, at a fixed address; None before there are any.
    """

    limit: int
    filled: Tensor | None

    def start_fixed(self, limit: int) -> None:
        """Begin without buffers; to be called before anything else is set."""
        self.limit = limit
        self.filled = None
        self._loose: dict[_Side, Tensor | None] = {"keys": None, "values": None}
        self._buffers: dict[_Side, Tensor] = {}
        self._counts: dict[_Side, int] = {"keys": 0, "values": 0}

    @property
    def capacity(self) -> int:
        """Entries the buffers have room for; 0 before there are any."""
        return int(self._buffers["keys"].shape[2]) if self._buffers else 0

    @property
    def keys(self) -> Tensor | None:
        """``[B, G, P, d]``; a view of the buffer where there is one."""
        return self._states("keys")

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._replace("keys", states)

    @property
    def values(self) -> Tensor | None:
        """``[B, G, P, d]``; a view of the buffer where there is one."""
        return self._states("values")

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._replace("values", states)

    def settle(self) -> None:
        """Move what is stored into buffers with room for the tokens that may still come; once is enough."""
        if not self._buffers and self.stored:
            for side in _SIDES:
                self._move(side, rounded(self.stored + max(0, self.limit - self.seen)))

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new entries behind the others, in place.

        Args:
            keys: ``[B, G, q, d]``.
            values: ``[B, G, q, d]``.

        Returns:
            Everything stored, keys and values.

        Raises:
            RuntimeError: before :meth:`settle`.
        """
        if self.filled is None:
            raise RuntimeError("there are no buffers to write to before settle()")
        query = keys.shape[2]
        places = torch.arange(query, device=self.filled.device) + self.filled
        for side, states in zip(_SIDES, (keys, values), strict=True):
            needed = self._counts[side] + query
            if needed > self._buffers[side].shape[2]:
                self._move(side, rounded(needed))
            buffer = self._buffers[side]
            buffer[:, :, places.to(buffer.device)] = states.to(buffer.dtype)
            self._counts[side] = needed
        self.filled.add_(query)
        return self._view("keys"), self._view("values")

    def _view(self, side: _Side) -> Tensor:
        return self._buffers[side][:, :, : self._counts[side]]

    def _states(self, side: _Side) -> Tensor | None:
        return self._view(side) if side in self._buffers else self._loose[side]

    def _replace(self, side: _Side, states: Tensor | None) -> None:
        """Take over other states, into the buffer where there is one."""
        buffer = self._buffers.get(side)
        if states is None or buffer is None:
            self._buffers.pop(side, None)
            self._loose[side] = states
            if not self._buffers:
                self.filled = None
            return
        count = states.shape[2]
        if states.shape[0] != buffer.shape[0] or count > buffer.shape[2]:
            self._loose[side] = states
            del self._buffers[side]
            self._move(side, max(buffer.shape[2], rounded(count)))
            return
        if states.data_ptr() != buffer.data_ptr():
            # What is cut off at the end stands where it stood; another part of the buffer must not be read
            # while it is written over.
            own = states.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
            buffer[:, :, :count] = states.clone() if own else states
        self._count(side, count)

    def _move(self, side: _Side, capacity: int) -> None:
        """Give one side a new buffer that holds what it held."""
        states = self._states(side)
        if states is None:
            return
        batch, heads, count, width = states.shape
        # What is not filled yet must be finite: who reads the whole buffer hides it by a mask.
        buffer = states.new_zeros(batch, heads, capacity, width)
        buffer[:, :, :count] = states
        self._buffers[side], self._loose[side] = buffer, None
        self._count(side, count)

    def _count(self, side: _Side, count: int) -> None:
        self._counts[side] = count
        if self.filled is None:
            self.filled = torch.zeros(1, dtype=torch.int64, device=self._buffers[side].device)
        if side == "keys":
            self.filled.fill_(count)
