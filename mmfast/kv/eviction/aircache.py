"""AirCache: the last tokens that speak alike judge the images, and layers that see more keep more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.kv.base import ModelEvictor, top_mask
from mmfast.kv.entries import Entries, Retained
from mmfast.registry import register

_LOGITS = 1 << 22
"""Largest number of logits held at once (16 MiB)."""
_LEAST = 0.01
"""Least share of the visual entries that a layer keeps."""
_LEAST_SKEWNESS = 1e-3


@dataclass(frozen=True)
class Judged:
    """What one layer shows.

    Attributes:
        visual: bool ``[n]``.
        importance: float64 ``[N]`` of the visual entries, on the CPU.
    """

    visual: Tensor
    importance: Tensor


@register("aircache", stage="cache", paper="arXiv 2503.23956")
@dataclass(frozen=True)
class AirCache(ModelEvictor):
    """Keep the visual entries that the elite of the question attends to; text stays.

    The elite are the tokens after the last visual one that the last token attends to almost as much as to the most
    attended of them, and the last token itself. Layers in which they attend more to visual entries, and to few of
    them, keep more; what a layer gets is rounded and bounded to 1 % and all of its visual entries, so that the
    average may differ a little from ``keep``.

    Paper: "AirCache: Activating Inter-modal Relevancy KV Cache Compression for Efficient Large Vision-Language Model
    Inference". No code is public; what the paper leaves open is read so that the average over the layers is kept.

    Attributes:
        keep: visual entries, the same for all heads, on average over the layers.
        alpha: how much of the highest attention makes a token one of the elite.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True

    alpha: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r} must lie between 0 and 1: a part of the highest attention")

    def observe(self, entries: Entries) -> Judged:
        """Let the elite judge the visual entries."""
        if not bool(entries.visual.any()):
            return Judged(entries.visual, torch.zeros(0, dtype=torch.float64))
        return Judged(entries.visual, self.importance(entries, self.elite(entries)).double().cpu())

    def settle(self, observed: Sequence[Judged]) -> list[Retained | None]:
        """Decide for every layer."""
        seeing = [layer for layer in observed if len(layer.importance)]
        totals = [len(layer.importance) for layer in seeing]
        if all(self.keep_count(total) >= total for total in totals):
            return [None] * len(observed)
        ratios = iter(self.ratios([layer.importance for layer in seeing]))
        masks = [self.choose(layer, next(ratios) if len(layer.importance) else 1.0) for layer in observed]
        return [None if bool(mask.all()) else Retained(mask) for mask in masks]

    def elite(self, entries: Entries) -> Tensor:
        """Mark the tokens whose attention judges, bool ``[n]``."""
        length, visual = len(entries), entries.visual
        places = torch.arange(length, device=visual.device)
        view = entries.view
        logits = view.logits(places[-1:])[:, 0, view.past :].masked_fill(visual, -torch.inf)
        attention = torch.nan_to_num(logits.softmax(dim=-1)).mean(dim=0)
        last = places == length - 1
        after = ~visual & (visual.flip(0).cumsum(0).flip(0) == 0) if bool(visual.any()) else ~visual
        candidates = after | last
        highest = attention[candidates].max()
        return candidates & (attention >= self.alpha * highest) | last

    def importance(self, entries: Entries, elite: Tensor) -> Tensor:
        """Return the mean attention of the elite to each visual entry, beside which they see only one another.

        Args:
            entries: the entries.
            elite: bool ``[n]``.

        Returns:
            float32 ``[N]``.
        """
        view, visual = entries.view, entries.visual
        rows = elite.nonzero().squeeze(-1)
        hidden = ~(visual | elite)
        total = torch.zeros(int(visual.sum()), device=visual.device)
        for part in rows.split(max(1, _LOGITS // (view.heads * view.key.shape[1]))):
            logits = view.logits(part)[..., view.past :].masked_fill(hidden, -torch.inf)
            total += torch.nan_to_num(logits.softmax(dim=-1))[..., visual].sum(dim=(0, 1))
        return total / (view.heads * rows.numel())

    def ratios(self, importance: Sequence[Tensor]) -> list[float]:
        """Share out the budget over the layers.

        Args:
            importance: ``[N]`` of each layer, N at least 1.

        Returns:
            The share of its visual entries that each layer keeps.
        """
        strengths = [float(layer.sum()) for layer in importance]
        skews = [skewness(layer) for layer in importance]
        strength = sum(strengths) / len(strengths) or 1.0
        skew = sum(skews) / len(skews)
        found = []
        for layer, own, peaked in zip(importance, strengths, skews, strict=True):
            keep = self.keep if isinstance(self.keep, float) else self.keep / len(layer)
            found.append(min(1.0, max(_LEAST, (own / strength + peaked / skew) / 2 * keep)))
        return found

    @staticmethod
    def count(ratio: float, total: int) -> int:
        """Say how many of ``total`` visual entries a layer keeps.

        Example:
            >>> AirCache.count(0.25, 10), AirCache.count(0.01, 10)
            (3, 1)
        """
        return min(total, max(1, math.floor(ratio * total + 0.5)))

    def choose(self, layer: Judged, ratio: float) -> Tensor:
        """Mark text and the share ``ratio`` of the visual entries of one layer, bool ``[n]``."""
        mask = torch.ones_like(layer.visual)
        mask[layer.visual] = top_mask(layer.importance, self.count(ratio, len(layer.importance))).to(mask.device)
        return mask


def skewness(values: Tensor) -> float:
    """Return the adjusted skewness of ``[N]`` values; at least 0.001, and that where it is not defined.

    Example:
        >>> round(skewness(torch.tensor([0.0, 0.0, 0.0, 1.0])), 4), skewness(torch.tensor([1.0, 2.0]))
        (2.0, 0.001)
    """
    count = values.numel()
    if count < 3:
        return _LEAST_SKEWNESS
    centred = values.double() - values.double().mean()
    deviation = float((centred.square().sum() / (count - 1)).sqrt())
    if deviation == 0:
        return _LEAST_SKEWNESS
    found = count / ((count - 1) * (count - 2)) * float((centred / deviation).pow(3).sum())
    return max(_LEAST_SKEWNESS, found)
