"""ThinK: keys without the channels that matter least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.kv.base import Packed, Packer, top_mask
from mmfast.kv.entries import Entries
from mmfast.kv.eviction.snapkv import check_window
from mmfast.kv.quantised import Raw, Side
from mmfast.registry import register


@register("think", stage="cache", paper="arXiv 2407.21018", source="NVIDIA/kvpress", vectors=True)
@dataclass(frozen=True)
class ThinK(Packer):
    """Drop the channels of the prompt's keys that add least to its attention.

    A channel of a head counts what it adds to the logits on average: the mean square of the last queries
    times that of the keys, both rotated. Dropped channels read as zero, so that they add nothing. Values stay
    as they are, and so do the keys of generated tokens, in all their channels: what a generated token will
    be asked is not known yet.

    Paper: "ThinK: Thinner Key Cache by Query-Driven Pruning".

    Attributes:
        residual: newest entries that stay as they are.
        drop: share of the channels of keys that go, per head.
        window: number of last tokens of the prompt whose queries count.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True

    residual: int = 0
    drop: float = 0.4
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window)
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop={self.drop!r} must be at least 0 and below 1: a share of the channels")

    def pack(self, states: Tensor, side: Side, entries: Entries | None) -> Packed:
        """Narrow a block of the prompt's keys."""
        width = states.shape[-1]
        kept = width - int(self.drop * width)
        if side == "value" or entries is None or kept == width or not states.shape[1]:
            return Raw.of(states)
        mask = top_mask(self.score(states, entries), kept)
        # The kept channels of each head, ascending: the sort is stable.
        channels = mask.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
        narrow = states.gather(2, channels[:, None].expand(-1, states.shape[1], -1))
        return Narrow(channels.short(), narrow, width)

    def score(self, keys: Tensor, entries: Entries) -> Tensor:
        """Say what each channel of ``[G, n, d]`` keys adds to the logits, float32 ``[G, d]``."""
        queries = entries.view.query[:, -self.window :].float()
        score = entries.per_group((queries**2).mean(dim=1)) * (keys.float() ** 2).mean(dim=1)
        return torch.nan_to_num(score)


@dataclass(frozen=True, eq=False)
class Narrow(Packed):
    """A block of which some channels are zero.

    Attributes:
        channels: int16 ``[G, k]``, which channels of a head are stored.
        states: ``[G, n, k]``, these channels.
        width: number d of all channels.
    """

    channels: Tensor
    states: Tensor
    width: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the channels and which they are."""
        return self.channels, self.states

    def restore(self) -> Tensor:
        """Put the channels back into their places."""
        full = self.states.new_zeros(*self.states.shape[:2], self.width)
        return full.scatter(2, self.channels.long()[:, None].expand_as(self.states), self.states)
