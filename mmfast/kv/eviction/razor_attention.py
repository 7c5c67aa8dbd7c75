"""RazorAttention: heads that look far back keep everything, the others both ends and a summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.kv.base import Evictor
from mmfast.kv.entries import Entries, Retained
from mmfast.kv.eviction.lagkv import check_sinks
from mmfast.registry import register


@register("razor_attention", stage="cache", paper="arXiv 2407.15891")
@dataclass(frozen=True)
class RazorAttention(Evictor):
    """Keep whole the heads that retrieve; of the others the first and last entries and one for all between.

    The entry that stands for n dropped ones has the mean of their keys and of their values, sits in the slot of the
    first of them and gets log n added to its logits. Which heads retrieve is a property of the model that has to be
    measured once; without ``retrieval_heads`` every head keeps its ends.

    ``keep`` is the average over the heads of a layer: heads that retrieve get as many entries as leaves the others
    their least share, and what these heads do not need goes to the others in equal parts. So the heads of a layer
    keep ``keep`` times their number together, however many retrieve.

    Paper: "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads", ICLR 2025.

    Attributes:
        keep: entries per head on average, sinks and summaries included.
        retrieval_heads: pairs (layer, key/value head) of the heads that retrieve.
        sinks: entries at the start that always stay.
        recent: least share of ``keep`` that a head that does not retrieve gets, cut off.
    """

    ragged: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    retrieval_heads: tuple[tuple[int, int], ...] = ()
    sinks: int = 4
    recent: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sinks(self.sinks)
        if isinstance(self.recent, bool) or not 0 <= self.recent <= 1:
            raise ValueError(f"recent={self.recent!r} must be a number from 0 to 1: a share of keep")
        heads: object = self.retrieval_heads
        if not isinstance(heads, Sequence) or not all(map(_is_pair, heads)):
            raise ValueError(
                f"retrieval_heads={heads!r} must hold pairs (layer, key/value head) of ints of at least 0, "
                "such as ((0, 3), (5, 1))"
            )
        # Plan files have lists.
        object.__setattr__(self, "retrieval_heads", tuple((layer, head) for layer, head in heads))

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Cut every head to its size."""
        sizes = self.sizes(len(entries), kept, entries.layer, entries.heads)
        whole = [size == len(entries) for size in sizes]
        first = [min(self.sinks, size - 1) for size in sizes]
        last = [size - 1 - start for size, start in zip(sizes, first, strict=True)]
        device = entries.keys.device
        ends = torch.tensor([first, last], device=device)
        return compensated(entries, ends[0], ends[1], torch.tensor(whole, device=device))

    def sizes(self, total: int, kept: int, layer: int, heads: int) -> list[int]:
        """Share the budget of a layer among its heads; the sum is ``kept * heads``.

        Args:
            total: entries of the prompt.
            kept: entries per head on average.
            layer: index of the layer.
            heads: number of key/value heads.

        Example:
            >>> RazorAttention(retrieval_heads=((0, 1),)).sizes(100, 40, 0, 4)
            [20, 100, 20, 20]
            >>> RazorAttention(retrieval_heads=((0, 1),)).sizes(100, 20, 0, 4)
            [4, 68, 4, 4]
        """
        retrieves = [(layer, head) in self.retrieval_heads for head in range(heads)]
        seekers, others = sum(retrieves), heads - sum(retrieves)
        if not seekers or not others:
            return [kept] * heads
        least = max(1, int(self.recent * kept))
        full = min(total, (kept * heads - others * least) // seekers)
        rest, extra = divmod(kept * heads - seekers * full, others)
        before = 0
        sizes = []
        for seeks in retrieves:
            sizes.append(full if seeks else rest + (before < extra))
            before += not seeks
        return sizes


def compensated(entries: Entries, first: Tensor, last: Tensor, whole: Tensor) -> Retained:
    """Replace what lies between the ends of each head by one entry.

    Args:
        entries: the prompt.
        first: int64 ``[G]``, entries at the start of each head that stay.
        last: int64 ``[G]``, entries at its end.
        whole: bool ``[G]``, heads of which nothing goes.

    Returns:
        The choice, with the means in the slot of the first dropped entry, and the logarithm of their number as bias.

    Example:
        >>> states = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
        >>> one = torch.tensor([1])
        >>> found = compensated(Entries.of(states, states), one, one, torch.tensor([False]))
        >>> found.kept.tolist(), found.values[0, 1].tolist(), round(found.bias[0, 1].item(), 4)
        ([[True, True, False, True]], [3.0], 0.6931)
    """
    place = torch.arange(len(entries), device=entries.keys.device)
    dropped = (place >= first[:, None]) & (place < len(entries) - last[:, None]) & ~whole[:, None]
    count = dropped.sum(dim=-1).clamp_min(1)
    slot = dropped & (place == first[:, None])
    share = dropped / count[:, None]
    means = [torch.einsum("gn,gnd->gd", share, states.float()) for states in (entries.keys, entries.values)]
    keys, values = (
        torch.where(slot[..., None], mean[:, None].to(states.dtype), states)
        for mean, states in zip(means, (entries.keys, entries.values), strict=True)
    )
    return Retained(~dropped | slot, keys, values, bias=slot * count.float().log()[:, None])


def _is_pair(pair: object) -> bool:
    """Say whether this is (layer, head)."""
    return (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in pair)
    )
