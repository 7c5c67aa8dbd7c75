"""Elastic Cache: unimportant entries melt into the important one that stands nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.kv.base import Evictor, top_mask
from mmfast.kv.entries import Entries, Retained, Step
from mmfast.kv.eviction.streaming_llm import check_start, evicted, own_places, remember_stored
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, check_choice


@register("elastic_cache", stage="cache", paper="arXiv 2407.18121", source="liuzuyan/ElasticCache", vectors=True)
@dataclass(frozen=True)
class ElasticCache(Evictor):
    """Keep the entries that receive most attention, and merge each of the others into the nearest of them.

    Nearest means by place; an entry that absorbs others becomes the mean of all. The first entries and the
    last one always stay and absorb nothing. All heads keep the same; a fraction ``keep`` of the entries is
    rounded up. While tokens are generated, one entry goes whenever more than ``keep`` of all tokens seen
    are stored: always the one at the same place, counted from the end of what the prompt left.

    Paper: "Efficient Inference of Vision Instruction-Following Models with Elastic Cache".

    Attributes:
        start: number of first entries that stay; less where ``keep`` leaves no room beside them.
        distance: place at which decode steps evict: as many before the end of what the prompt left if at most
            0 (the middle where that would be before its second entry), counted from the start if above.
        compat: ``"official"`` does what the released code does: it mixes up ranks and places when it chooses,
            keeps one entry less, takes entries ``start`` places too early for those that go, and lets decode
            steps count from the other end where the prompt left less than ``distance`` (for the one place
            at which it would store the cache twice, nothing goes).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    decodes: ClassVar[bool] = True

    start: int = 1
    distance: int = -25
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start(self.start)
        check_distance(self.distance)
        check_choice("compat", self.compat, [None, "official"])

    def keep_count(self, entries: int) -> int:
        """Say how many of ``entries`` stay; a fraction is rounded up."""
        if isinstance(self.keep, int):
            return super().keep_count(entries)
        return max(1, entries - int(entries - entries * self.keep))

    def __call__(self, entries: Entries) -> Retained | None:
        """Decide about one prompt in one layer; None means that nothing goes."""
        retained = super().__call__(entries)
        if retained is None:
            self._remember(entries, len(entries), len(entries))
        return retained

    def _remember(self, entries: Entries, kept: int, stored: int) -> None:
        """Write down what decode steps need, where ``kept`` entries were to stay and ``stored`` did."""
        share = self.keep if isinstance(self.keep, float) else kept / len(entries)
        from_end = self.compat == "official" and self.distance <= 0
        place = kept + self.distance if from_end else eviction_place(kept, self.distance)
        remember_place(entries.memory, stored, share, place)

    def scores(self, entries: Entries) -> Tensor:
        """Return the attention each entry received, float32 ``[n]``."""
        return column_means(entries)

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Choose by attention, and merge."""
        scores = self.scores(entries)
        if self.compat == "official":
            mask, gone, anchors = misranked(scores, kept, self.start)
        else:
            mask = keep_ends(scores, kept, self.start)
            anchors = mask.nonzero().squeeze(-1)[min(self.start, kept - 1) : -1]
            gone = (~mask).nonzero().squeeze(-1)
        self._remember(entries, kept, int(mask.sum()))
        if not anchors.numel():
            return Retained(mask)
        target = nearest_place(gone, anchors)
        return Retained(mask, absorb(entries.keys, gone, target), absorb(entries.values, gone, target))

    def step(self, step: Step) -> Tensor | None:
        """Let the entry at the fixed place go, if too many are stored."""
        return evict_at_place(step)


def column_means(entries: Entries) -> Tensor:
    """Add up what each entry receives from all tokens of the prompt, on average over the heads.

    Returns:
        float32 ``[n]``, finite.
    """
    return torch.nan_to_num(entries.view.column_sums(torch.ones(len(entries), device=entries.keys.device)))


def keep_ends(scores: Tensor, kept: int, start: int) -> Tensor:
    """Mark the last entry, the first ``start`` (as far as there is room) and the best between them.

    Args:
        scores: ``[n]``.
        kept: how many in all.
        start: how many first ones.

    Returns:
        bool ``[n]``.

    Example:
        >>> keep_ends(torch.tensor([0.0, 1.0, 3.0, 2.0, 0.0]), 3, 1).tolist()
        [True, False, True, False, True]
    """
    forced = scores.clone()
    forced[: min(start, kept - 1)] = torch.inf
    forced[-1] = torch.inf
    return top_mask(forced, kept)


def misranked(scores: Tensor, kept: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose as the released code does, which compares the entry at each rank with the number to drop.

    Args:
        scores: ``[n]``.
        kept: how many were to stay.
        start: how many first ones always stay.

    Returns:
        bool ``[n]`` of what stays; places that are merged; places they may be merged into.
    """
    length = len(scores)
    start = min(start, kept - 1)
    order = scores[start : length - 1].argsort(stable=True)
    stays = order > length - kept
    mask = torch.ones(length, dtype=torch.bool, device=scores.device)
    mask[start : length - 1] = stays
    return mask, (~stays).nonzero().squeeze(-1), stays.nonzero().squeeze(-1) + start


def nearest_place(places: Tensor, anchors: Tensor) -> Tensor:
    """Return for each place the nearest anchor; the lower of two that are equally near.

    Args:
        places: ``[m]`` int64.
        anchors: ``[a]`` int64, ascending, at least one.

    Example:
        >>> nearest_place(torch.tensor([0, 3, 4, 9]), torch.tensor([1, 5])).tolist()
        [1, 1, 5, 5]
    """
    above = torch.searchsorted(anchors, places)
    lower, upper = anchors[(above - 1).clamp(min=0)], anchors[above.clamp(max=len(anchors) - 1)]
    return torch.where((places - lower).abs() <= (upper - places).abs(), lower, upper)


def absorb(states: Tensor, gone: Tensor, target: Tensor) -> Tensor:
    """Replace each target by the mean of itself and all entries that go into it.

    Args:
        states: ``[G, n, d]``.
        gone: ``[m]`` int64, places of the entries that go.
        target: ``[m]`` int64, places they go into.

    Example:
        >>> absorb(torch.tensor([[[1.0], [2.0], [6.0]]]), torch.tensor([0, 2]), torch.tensor([1, 1])).flatten().tolist()
        [1.0, 3.0, 6.0]
    """
    sums = states.float().index_add(1, target, states[:, gone].float())
    counts = torch.ones(states.shape[1], device=states.device)
    counts = counts.index_add(0, target, torch.ones(len(target), device=states.device))
    return (sums / counts[:, None]).to(states.dtype)


def eviction_place(kept: int, distance: int) -> int:
    """Say at which place decode steps evict, given what the prompt left.

    Example:
        >>> eviction_place(100, -25), eviction_place(20, -25), eviction_place(20, 3)
        (75, 10, 3)
    """
    if distance > 0:
        return min(distance, kept - 1)
    return kept + distance if kept + distance >= 1 else kept // 2


def remember_place(memory: dict[str, Tensor], stored: int, share: float, place: int) -> None:
    """Write down what decode steps need.

    Args:
        memory: of the prompt in one layer.
        stored: entries that the prompt left.
        share: share of all tokens that steps leave.
        place: where they evict; below zero from the end.
    """
    remember_stored(memory, stored)
    memory["share"] = torch.tensor(share, dtype=torch.float64)
    memory["place"] = torch.tensor(place)


def evict_at_place(step: Step) -> Tensor | None:
    """Let one entry go at the remembered place, if more than the remembered share of all tokens is stored.

    Returns:
        bool ``[P]``; None if nothing goes.
    """
    if "place" not in step.memory:
        return None
    places, place = own_places(step), int(step.memory["place"])
    stored = places.shape[-1]
    # At -1 the official code puts two slices together that overlap.
    if int(stored - step.seen * float(step.memory["share"])) < 1 or place == -1 or not -stored <= place < stored:
        return None
    stays = torch.ones(stored, dtype=torch.bool, device=places.device)
    stays[place] = False
    return evicted(step, places, stays)


def check_distance(distance: object) -> None:
    """Refuse a place that is none.

    Raises:
        ValueError: naming the value.
    """
    if isinstance(distance, bool) or not isinstance(distance, int):
        raise ValueError(f"distance={distance!r} must be an int: a place, counted from the end if not positive")
