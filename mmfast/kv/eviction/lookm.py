"""LOOK-M: text stays, and image entries that go are merged into the most similar ones that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import Evictor
from mmfast.kv.entries import Entries, Retained
from mmfast.kv.eviction.h2o import check_share, heavy_and_recent, received, recent_count
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, check_choice

_COSINES = 1 << 22
"""Largest number of cosines held at once (16 MiB)."""
_SINKS = 4
"""First entries that count as heavy where text has no priority."""


@register("lookm", stage="cache", paper="arXiv 2406.18139", source="SUSTechBruce/LOOK-M", vectors=True)
@dataclass(frozen=True)
class LookM(Evictor):
    """Keep text, the newest entries and what receives most attention, and merge the rest into the most similar.

    With ``text_prior`` no text goes: where a prompt has more text than its budget holds, all text stays (more
    than ``keep``) and of the images only what is among the newest entries; a prompt without images stays
    whole. Without it the first four entries are forced, and exactly ``keep`` stay. Similar means by the keys,
    which decide for the values too. Query heads that share a key/value head are added up.

    Paper: "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference".

    Attributes:
        recent: share of ``keep`` that are the newest entries.
        merge: what goes into the entries that stay: ``"pivotal"`` sends the middle between the two, ``"averaged"``
            the entry itself, ``"weighted"`` the entry times the cosine of the keys; an entry that stays becomes
            the mean of itself and all it was sent. The last two leave out what is less similar than the
            average. ``"none"`` drops.
        text_prior: whether all text ranks above all images.
        compat: ``"official"`` sends with ``"averaged"`` what the official code does: sources and targets are out
            of step from the first entry that is left out.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    recent: float = 0.5
    merge: Literal["pivotal", "weighted", "averaged", "none"] = "pivotal"
    text_prior: bool = True
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("recent", self.recent)
        check_choice("merge", self.merge, ["pivotal", "weighted", "averaged", "none"])
        check_choice("text_prior", self.text_prior, [True, False])
        check_choice("compat", self.compat, [None, "official"])

    def scores(self, entries: Entries) -> Tensor:
        """Return the attention each entry received, float32 ``[G, n]``."""
        return received(entries, "sum")

    def entry_counts(self, visual: int, text: int, layer: int, depth: int) -> int | None:
        """Leave it to the data where all text stays: how much of it is recent anyway is not known."""
        return None if self.text_prior else super().entry_counts(visual, text, layer, depth)

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Choose, and merge what goes."""
        mask = self.choose(self.scores(entries), entries.visual, kept)
        if self.merge == "none" or bool(mask.all()):
            return Retained(mask)
        return Retained(mask, *self.merged(entries.keys, entries.values, mask))

    def choose(self, scores: Tensor, visual: Tensor, kept: int) -> Tensor:
        """Mark what stays.

        Args:
            scores: ``[G, n]``, finite.
            visual: ``[n]`` bool.
            kept: the budget.

        Returns:
            bool ``[G, n]``, the same number in each head.
        """
        recent = recent_count(self.recent, kept)
        if self.text_prior:
            text = int((~visual[: len(visual) - recent]).sum())
            forced = scores.masked_fill(~visual, torch.inf)
            return heavy_and_recent(forced, max(kept, text + recent), recent)
        forced = scores.clone()
        forced[:, :_SINKS] = torch.inf
        return heavy_and_recent(forced, kept, recent)

    def merged(self, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Merge what goes into what stays.

        Args:
            keys: ``[G, n, d]``.
            values: ``[G, n, d]``.
            mask: bool ``[G, n]`` of what stays, the same number in each head, neither none nor all.

        Returns:
            keys and values ``[G, n, d]``; only rows that stay mean anything.
        """
        heads = mask.shape[0]
        stays, goes = (part.nonzero()[:, 1].view(heads, -1) for part in (mask, ~mask))
        cosine, target = most_similar(keys, stays, goes)
        used = torch.ones_like(cosine[0], dtype=torch.bool) if self.merge == "pivotal" else similar_enough(cosine)
        target, weight = target[:, used], cosine[:, used, None] if self.merge == "weighted" else 1.0
        misaligned = self.merge == "averaged" and self.compat == "official"
        goes = goes[:, : target.shape[-1]] if misaligned else goes[:, used]
        return self._sent(keys, stays, goes, target, weight), self._sent(values, stays, goes, target, weight)

    def _sent(self, states: Tensor, stays: Tensor, goes: Tensor, target: Tensor, weight: Tensor | float) -> Tensor:
        """Return ``states`` where each row of ``stays`` is the mean of itself and what it was sent."""
        own, sent = _rows(states, stays), _rows(states, goes) * weight
        if self.merge == "pivotal":
            sent = (sent + _rows(own, target)) / 2
        sums = own.scatter_add(1, _wide(target, states), sent)
        counts = torch.ones_like(stays, dtype=torch.float32)
        counts = counts.scatter_add(1, target, torch.ones_like(target, dtype=torch.float32))
        return states.scatter(1, _wide(stays, states), (sums / counts[..., None]).to(states.dtype))


def most_similar(keys: Tensor, stays: Tensor, goes: Tensor) -> tuple[Tensor, Tensor]:
    """Find for each key that goes the most similar one that stays; the first of equals.

    Args:
        keys: ``[G, n, d]``.
        stays: ``[G, k]`` int64, places.
        goes: ``[G, m]`` int64, places.

    Returns:
        cosines, float32 ``[G, m]``, and which of the k it is, int64 ``[G, m]``.

    Example:
        >>> keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
        >>> cosine, target = most_similar(keys, torch.tensor([[0, 1]]), torch.tensor([[2]]))
        >>> round(cosine.item(), 4), target.item()
        (0.8, 1)
    """
    unit = functional.normalize(keys.float(), dim=-1)
    anchors = _rows(unit, stays).transpose(1, 2)
    size = max(1, _COSINES // stays.numel())
    found = [(_rows(unit, part) @ anchors).max(dim=-1) for part in goes.split(size, dim=-1)]
    return torch.cat([best.values for best in found], dim=-1), torch.cat([best.indices for best in found], dim=-1)


def similar_enough(cosine: Tensor) -> Tensor:
    """Mark the entries whose cosine, on average over the heads, reaches the average over all.

    Heads may drop different entries; they are matched in their order.

    Args:
        cosine: ``[G, m]``.

    Returns:
        bool ``[m]``.

    Example:
        >>> similar_enough(torch.tensor([[0.9, 0.1, 0.5], [0.7, 0.3, 0.3]])).tolist()
        [True, False, False]
    """
    return cosine.mean(dim=0) >= cosine.mean()


def _wide(places: Tensor, states: Tensor) -> Tensor:
    return places[..., None].expand(-1, -1, states.shape[-1])


def _rows(states: Tensor, places: Tensor) -> Tensor:
    """Take the rows ``places`` ``[G, m]`` of ``states`` ``[G, n, d]``, in float32."""
    return states.gather(1, _wide(places, states)).float()
