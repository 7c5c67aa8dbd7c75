"""Cache layers that hold most of their keys and values in a smaller form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmfast.adapters.cache import LogicalLayer
from mmfast.kernels.quant_decode import Codes, quant_decode
from mmfast.kv.base import Packed, Packer
from mmfast.kv.cache import BOOKS
from mmfast.kv.entries import Entries
from mmfast.kv.quantised import Coded, Concatenated

_LEAST = 8
"""Generated tokens are packed so many at a time: a block each would take longer to read than to attend to, and
drafted tokens are read in one forward only where nothing is packed between them."""

_BOOKS = (*BOOKS, "peers", "prompts", "announced", "dtype", "device", "is_initialized")
_FAR = 64
"""More tokens than this are never drafted at once."""


@dataclass
class _Side:
    """The keys or the values of one row: blocks, oldest first, and what follows them as it is.

    Attributes:
        loose: ``[G, m, d]``.
        blocks: packed.
    """

    loose: Tensor
    blocks: list[Packed] = field(default_factory=list)
    _codes: Codes | None = None

    def codes(self) -> Codes | None:
        """Return all blocks as codes, joined once; None where there are none, or they cannot be."""
        if self._codes is None and self.blocks:
            self._codes = Concatenated(self.blocks).readable()
            if self._codes is not None and len(self.blocks) > 1:
                # What was joined is not kept twice.
                self.blocks = [Coded(self._codes)]
        return self._codes

    def states(self) -> Tensor:
        """Return everything, ``[G, n, d]``."""
        if not self.blocks:
            return self.loose
        return torch.cat([*(block.restore().to(self.loose.dtype) for block in self.blocks), self.loose], dim=1)

    def pack(self, packer: Packer, count: int, side: Literal["key", "value"], entries: Entries | None) -> None:
        """Pack the oldest ``count`` of what is loose."""
        if count:
            # A view would keep the whole alive.
            self.blocks.append(packer.pack(self.loose[:, :count], side, entries))
            self._codes = None
            self.loose = self.loose[:, count:].clone()

    def copy(self) -> _Side:
        """Share the blocks, which never change, with another beam."""
        return _Side(self.loose, list(self.blocks), self._codes)


_Row = dict[Literal["key", "value"], _Side]
_SIDES: tuple[Literal["key", "value"], ...] = ("key", "value")


class PackedLayer(LogicalLayer):
    """A logical layer that packs all but its newest entries; reading restores them for one layer at a time.

    Args:
        packer: how to pack.
        layer: the layer to take over, with everything it has stored.

    Attributes:
        waits: the next update only stores: whoever set this calls :meth:`attend` then.
    """

    waits = False

    def __init__(self, packer: Packer, layer: LogicalLayer) -> None:
        self._rows: list[_Row] = []
        self._leaving: list[int] = []
        super().__init__()
        self.packer = packer
        keys, values = layer.keys, layer.values
        for name in _BOOKS:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self._split(keys, values)

    def _split(self, keys: Tensor | None, values: Tensor | None) -> None:
        self._rows = []
        if keys is None or values is None:
            return
        for row, columns in enumerate(self._columns(keys.shape[0])):
            self._rows.append(
                {"key": _Side(keys[row][:, columns].clone()), "value": _Side(values[row][:, columns].clone())}
            )

    def _columns(self, batch: int) -> list[Tensor]:
        """Places of the real entries of each row among those stored."""
        if self.valid is None:
            return [torch.arange(self.stored)] * batch
        return [row.nonzero().squeeze(-1) for row in self.valid.cpu()]

    @property
    def stored(self) -> int:
        """Number of stored slots P."""
        return 0 if self.slots is None else int(self.slots.shape[1])

    def _whole(self, side: Literal["key", "value"]) -> Tensor | None:
        if not self._rows:
            return None
        rows = [row[side].states() for row in self._rows]
        if self.valid is None:
            return torch.stack(rows)
        heads, _, width = rows[0].shape
        whole = rows[0].new_zeros(len(rows), heads, self.stored, width)
        for index, columns in enumerate(self._columns(len(rows))):
            whole[index][:, columns.to(whole.device)] = rows[index]
        return whole

    @property
    def keys(self) -> Tensor | None:
        """``[B, G, P, d]``, restored; entries that are not real are zero."""
        return self._whole("key")

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._replace("key", states)

    @property
    def values(self) -> Tensor | None:
        """``[B, G, P, d]``, restored; entries that are not real are zero."""
        return self._whole("value")

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._replace("value", states)

    def _replace(self, side: Literal["key", "value"], states: Tensor | None) -> None:
        """Take over changed states where they are loose; what is packed must be what it was."""
        if states is None:
            self._rows = []
            return
        for row, columns in enumerate(self._columns(len(self._rows))):
            own = self._rows[row][side]
            packed = columns.numel() - own.loose.shape[1]
            own.loose = states[row][:, columns[packed:].to(states.device)].clone()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values, return everything, and pack what is due."""
        batch, _, query, _ = key_states.shape
        self.account(batch, query, key_states.device)
        for row in range(batch):
            real = slice(None) if self.valid is None else self.valid[row, -query:].to(key_states.device)
            for side, states in zip(_SIDES, (key_states, value_states), strict=True):
                own = self._rows[row][side]
                own.loose = torch.cat([own.loose, states[row][:, real]], dim=1)
        if self.waits:
            return key_states, value_states
        keys, values = self._whole("key"), self._whole("value")
        if keys is None or values is None:
            raise RuntimeError("a packed layer lost its rows")
        if query == 1:
            self._pack_due()
        return keys, values

    def _pack_due(self) -> None:
        for row in self._rows:
            for side in _SIDES:
                own = row[side]
                due = self.packer.due(own.loose.shape[1], side)
                if due >= _LEAST:
                    own.pack(self.packer, due, side, None)

    @property
    def loose(self) -> Tensor:
        """``[G, m, d]``, keys of the first row that are not packed."""
        return self._rows[0]["key"].loose

    def unreadable(self) -> str:
        """Say why entries cannot be attended to as they are packed; empty where they can."""
        sides = [side for row in self._rows for side in row.values()]
        if all(side.codes() is not None for side in sides if side.blocks):
            return ""
        return f"method {self.packer.name!r} stores blocks in a form that attention cannot read"

    def stop_waiting(self) -> None:
        """Let updates return everything again."""
        self.waits = False

    def attend(
        self, query: Tensor, seen: Tensor | None, bias: Tensor | None, scaling: float | None, softcap: float | None
    ) -> Tensor:
        """Attend from the newest token of each row, which is stored already, and pack what is due.

        Args:
            query: ``[B, H, 1, d]``.
            seen: bool ``[B, S, P]``, which stored entries are seen; None = all that are real.
            bias: float ``[B, S, P]``, added to the logits; None = nothing.
            scaling: factor of the logits.
            softcap: cap of the logits.

        Returns:
            ``[B, H, 1, d]``.
        """
        outputs = []
        # Rows have packed different numbers of entries; they are stored without the padding between them.
        for index, (row, columns) in enumerate(zip(self._rows, self._columns(len(self._rows)), strict=True)):
            own, columns = slice(index, index + 1), columns.to(query.device)
            whole = self.valid is None
            marks, weights = (
                one if one is None or whole else one[..., columns]
                for one in (None if seen is None else seen[own], None if bias is None else bias[own])
            )
            key, value = row["key"], row["value"]
            output, _ = quant_decode(
                query[own], key.codes(), value.codes(), key.loose[None], value.loose[None],
                visible=marks, bias=weights, scaling=scaling, softcap=softcap,
            )  # fmt: skip
            outputs.append(output)
        self._pack_due()
        return torch.cat(outputs)

    def keep_block(self, query: int, places: Tensor, real: Tensor | None) -> None:
        """Keep some of the last ``query`` tokens, and pack what is due then."""
        super().keep_block(query, places, real)
        if query > 1:
            self._pack_due()

    def keep_states(self, query: int, places: Tensor, real: Tensor | None) -> None:
        """Move the last keys and values, which are loose."""
        for index, row in enumerate(self._rows):
            stood = torch.ones(query, dtype=torch.bool) if self.valid is None else self.valid[index, -query:].cpu()
            stay = places[index].cpu() if real is None else places[index].cpu()[real[index].cpu()]
            stay = (stood.cumsum(0) - 1)[stay]
            count = int(stood.sum())
            if len(stay) == count:
                # All stay, and may have been packed by now.
                continue
            for side in row.values():
                past = side.loose.shape[1] - count
                own = side.loose[:, past:][:, stay.to(side.loose.device)]
                side.loose = torch.cat([side.loose[:, :past], own], dim=1)

    def room(self) -> int | None:
        """Say how many tokens may come before the next are packed, which the one after would see."""
        counts = []
        for row in self._rows:
            for side in _SIDES:
                loose, count = row[side].loose.shape[1], 1
                while count < _FAR and self.packer.due(loose + count, side) < _LEAST:
                    count += 1
                counts.append(count)
        return min(counts, default=None)

    def pack(self, prompts: Sequence[tuple[int, Entries]], after: int) -> None:
        """Pack a prompt that has just been read, and what was loose before it.

        Args:
            prompts: rows with prompts, and the entries of these.
            after: entries that follow the prompt already; they stay loose.
        """
        for row, entries in prompts:
            for side in _SIDES:
                own = self._rows[row][side]
                # Rows were full before the prompt, so that what is older is a block of its own.
                own.pack(self.packer, own.loose.shape[1] - len(entries) - after, side, None)
                due = min(self.packer.due(own.loose.shape[1], side), len(entries))
                places = torch.arange(due, device=own.loose.device)
                part = entries if due == len(entries) else replace(entries.take(places), attention=entries.attention)
                own.pack(self.packer, due, side, part)

    def storage(self) -> list[Tensor]:
        """Return every tensor that holds keys, values or what is known of single entries of a head."""
        held = [tensor for tensor in (self.heads, self.places, self.bias) if tensor is not None]
        for row in self._rows:
            for side in row.values():
                held += [side.loose, *(tensor for block in side.blocks for tensor in block.tensors())]
        for book in self.prompts or []:
            held += [] if book is None else list(book.memory.values())
        return held

    def _real(self, tokens: int) -> list[int]:
        """Count the real ones among the last stored tokens, row by row."""
        if self.valid is None:
            return [tokens] * len(self._rows)
        return [int(row[-tokens:].sum()) for row in self.valid]

    def check_drop(self, tokens: int) -> None:
        """Refuse also where tokens have been packed.

        Raises:
            ValueError: saying so.
        """
        super().check_drop(tokens)
        pairs = zip(self._rows, self._real(tokens), strict=True)
        if any(row[side].loose.shape[1] < count for row, count in pairs for side in _SIDES):
            raise ValueError(
                f"cannot take back {tokens} tokens: they have been packed already; give the method of the cache a "
                "larger residual"
            )

    def drop_last(self, tokens: int) -> None:
        """Undo the last ``tokens`` tokens, which are loose.

        Raises:
            ValueError: if this layer or one of its peers cannot; nothing has changed then.
        """
        self._leaving = self._real(tokens) if tokens else []
        super().drop_last(tokens)

    def forget_states(self, tokens: int) -> None:
        """Cut the last keys and values off."""
        for row, count in zip(self._rows, self._leaving, strict=True):
            for side in row.values():
                side.loose = side.loose[:, : side.loose.shape[1] - count].clone()

    def gather_states(self, order: Tensor, real: Tensor) -> None:
        """Thin out what is loose; what is packed stays as it is.

        Raises:
            ValueError: if something packed would have to go.
        """
        found = []
        for row, before in enumerate(self._columns(order.shape[0])):
            rank = torch.full((self.stored,), -1)
            rank[before] = torch.arange(before.numel())
            source = rank[order[row].cpu()[:, real[row].cpu()]]
            for side in _SIDES:
                own = self._rows[row][side]
                packed = before.numel() - own.loose.shape[1]
                if not bool((source[:, :packed] == torch.arange(packed)).all()):
                    raise ValueError(
                        "a packed cache cannot lose entries that have been packed, nor gain heads of different "
                        "length; evict with a method that treats all heads alike, or start from a fresh cache"
                    )
                chosen = (source[:, packed:] - packed).to(own.loose.device)[..., None]
                found.append((own, own.loose.gather(1, chosen.expand(-1, -1, own.loose.shape[-1]))))
        for own, loose in found:
            own.loose = loose

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self._choose(beam_idx.tolist())
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._choose([row for row in range(len(self._rows)) for _ in range(repeats)])
        self.repeat_rows(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        rows = indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices
        self._choose(rows.tolist())
        self.select_rows(rows)

    def _choose(self, rows: Sequence[int]) -> None:
        self._rows = [{side: self._rows[row][side].copy() for side in _SIDES} for row in rows]
