"""PrefixKV: layers whose attention is spread widely keep more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmfast.kv.base import ModelEvictor
from mmfast.kv.entries import Entries, Retained, Step
from mmfast.kv.eviction.elastic_cache import (
    check_distance,
    column_means,
    evict_at_place,
    eviction_place,
    keep_ends,
    remember_place,
)
from mmfast.kv.eviction.streaming_llm import check_start
from mmfast.registry import register

_ROUNDS = 64
"""Bisections end here; where many entries receive the same the search would never meet its target."""
_NEAR = 5
"""How far from the target the number of dropped entries, over all layers, may be when the search ends."""


@dataclass(frozen=True)
class Received:
    """What one layer says.

    Attributes:
        scores: float32 ``[n]``, attention each entry received.
        layer: index of the layer.
        memory: where the layer remembers things for decode steps.
    """

    scores: Tensor
    layer: int
    memory: dict[str, Tensor]


@register("prefixkv", stage="cache", paper="arXiv 2412.03409", source="THU-MIG/PrefixKV", vectors=True)
@dataclass(frozen=True)
class PrefixKV(ModelEvictor):
    """Keep in every layer the entries that receive most attention, as many as hold the same share of it.

    A bisection finds the share with which the layers together drop as many as they should; what is left
    to drop or to keep is spread in proportion and cut off, so that a layer keeps up to two entries more than
    ``keep`` on average. All heads of a layer keep the same; the first entries and the last one always stay.
    While tokens are generated, one entry of a layer goes whenever the layer stores more than its share of
    all tokens seen: always the one at the same place, counted from the end of what the prompt left.

    Paper: "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient
    Generation".

    Attributes:
        keep: entries per layer, on average over the layers; not looked at where there are ``ratios``.
        start: number of first entries that stay; less where a layer has no room beside them.
        distance: place at which decode steps evict: as many before the end of what the prompt left if at most
            0 (the middle where that would be before its second entry), counted from the start if above.
        ratios: share of the entries that each layer drops, first to last, measured before; None = measured on
            every prompt.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True
    decodes: ClassVar[bool] = True

    start: int = 1
    distance: int = -25
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start(self.start)
        check_distance(self.distance)
        if self.ratios is not None and not (self.ratios and all(0 <= ratio < 1 for ratio in self.ratios)):
            raise ValueError(f"ratios={self.ratios!r} must hold one number from 0 up to (not including) 1 per layer")

    def keep_count(self, entries: int) -> int:
        """Say how many of ``entries`` stay, on average over the layers."""
        if self.ratios is None:
            return super().keep_count(entries)
        dropped = [dropped_count(ratio, entries) for ratio in self.ratios]
        return entries - round(sum(dropped) / len(dropped))

    def observe(self, entries: Entries) -> Received:
        """Take what each entry received.

        Raises:
            ValueError: if there are ``ratios`` for another number of layers.
        """
        if self.ratios is not None and len(self.ratios) != entries.depth:
            raise ValueError(f"ratios has {len(self.ratios)} numbers, but the model has {entries.depth} layers")
        return Received(self.scores(entries), entries.layer, entries.memory)

    def scores(self, entries: Entries) -> Tensor:
        """Return what each entry received, float32 ``[n]``."""
        return column_means(entries)

    def settle(self, observed: Sequence[Received]) -> list[Retained | None]:
        """Spread what is to be dropped over the layers, and choose in each."""
        if self.ratios is None:
            dropped = self.measured([layer.scores for layer in observed])
        else:
            dropped = [dropped_count(self.ratios[layer.layer], len(layer.scores)) for layer in observed]
        return [self.choose(layer, number) for layer, number in zip(observed, dropped, strict=True)]

    def choose(self, layer: Received, dropped: int) -> Retained | None:
        """Decide about one layer, given how many of its entries go."""
        length = len(layer.scores)
        share = dropped / length if self.ratios is None else self.ratios[layer.layer]
        remember_place(layer.memory, length - dropped, 1 - share, eviction_place(length - dropped, self.distance))
        return Retained(keep_ends(layer.scores, length - dropped, self.start)) if dropped else None

    def measured(self, scores: Sequence[Tensor]) -> list[int]:
        """Say how many entries each layer drops, from what they received.

        Args:
            scores: ``[n]`` of each layer.
        """
        lengths = [len(row) for row in scores]
        kept = [super(PrefixKV, self).keep_count(length) for length in lengths]
        # The last entry always stays, and the first ones where there is room.
        limits = [n - 1 - min(self.start, k - 1) for n, k in zip(lengths, kept, strict=True)]
        if isinstance(self.keep, int):
            target = float(sum(lengths) - sum(kept))
        else:
            # 1 - 0.9 is a little less than 0.1, which would cost a layer an entry when numbers are cut off.
            target = sum(lengths) * round(1 - self.keep, 12)
        return spread(prefix_search(scores, target, self.start + 1), target, limits)

    def step(self, step: Step) -> Tensor | None:
        """Let the entry at the fixed place go, if too many are stored."""
        return evict_at_place(step)


def dropped_count(ratio: float, entries: int) -> int:
    """Say how many of ``entries`` go where a profile drops ``ratio`` of them; one stays at least."""
    return min(round(ratio * entries), entries - 1)


def prefix_search(scores: Sequence[Tensor], target: float, protected: int) -> list[int]:
    """Find the share of attention that every layer has to keep so that ``target`` entries go in all.

    Args:
        scores: ``[n]`` of each layer, not negative; lengths may differ.
        target: number of entries to drop, over all layers.
        protected: entries of a layer that never go.

    Returns:
        how many each layer drops at that share; about ``target`` in all.

    Example:
        >>> prefix_search([torch.tensor([8.0] + [0.1] * 19), torch.ones(20)], 20, 0)
        [19, 5]
    """
    device = scores[0].device
    ordered = [row.float().sort(descending=True).values for row in scores]
    sums = [(row / row.sum().clamp(min=torch.finfo(torch.float32).tiny)).cumsum(dim=0).to(device) for row in ordered]
    table = pad_sequence(sums, batch_first=True, padding_value=torch.inf)
    lengths = torch.tensor([len(row) for row in scores], device=device)
    low, high = 0.0, 1.0
    for _ in range(_ROUNDS):
        share = (low + high) / 2
        held = torch.searchsorted(table, table.new_full((len(table), 1), share)).squeeze(-1)
        found: list[int] = (lengths - (held + 1) - protected).clamp(min=0).tolist()
        if abs(sum(found) - target) < _NEAR:
            break
        low, high = (low, share) if sum(found) < target else (share, high)
    return found


def spread(found: Sequence[int], target: float, limits: Sequence[int]) -> list[int]:
    """Scale what each layer drops so that all together drop ``target``, cut off.

    Args:
        found: what each layer would drop.
        target: number to drop over all layers, at most the sum of ``limits``.
        limits: most that each layer can drop.

    Returns:
        numbers of which the sum is at most ``target``, and less than one per layer below it.

    Example:
        >>> spread([37, 38, 44, 44], 160, [78] * 4), spread([0, 0], 7, [9, 9]), spread([9, 1], 14, [10, 10])
        ([36, 37, 43, 43], [3, 3], [10, 4])
    """
    total = sum(found)
    wanted = [int(each * target / total) if total else 0 for each in found]
    dropped = [min(each, limit) for each, limit in zip(wanted, limits, strict=True)]
    # Only where a layer cannot drop its part, or none would drop anything, do the others have to drop more.
    while (missing := int(target) - sum(dropped)) >= len(limits):
        free = sum(each < limit for each, limit in zip(dropped, limits, strict=True))
        if not free:
            break
        dropped = [min(limit, each + missing // free) for each, limit in zip(dropped, limits, strict=True)]
    return dropped
