"""PyramidKV: early layers keep more than late ones, by the scores of another method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

from torch import Tensor

from mmfast.budget import shares
from mmfast.kv.base import CacheScorer, scorer_named
from mmfast.kv.entries import Entries
from mmfast.kv.eviction.snapkv import fitting_window
from mmfast.registry import register
from mmfast.token_pruning.base import check_choice


@dataclass(frozen=True)
class ScorerUser(CacheScorer):
    """Base of methods that share out a budget by the scores of another method.

    Attributes:
        scorer: the method that scores, by name or with options such as ``"snapkv(window=16)"``; its budget is
            given here.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True

    scorer: str = "snapkv"

    def __post_init__(self) -> None:
        super().__post_init__()
        # What is needed depends on the other method.
        object.__setattr__(self, "needs", self.inner.needs)
        object.__setattr__(self, "reads_question", self.inner.reads_question)

    @cached_property
    def inner(self) -> CacheScorer:
        """The method that scores, with the budget of this one.

        Raises:
            ValueError: if ``scorer`` names no such method.
        """
        found = scorer_named(self.scorer)
        if isinstance(found, type(self)) or found.ragged or type(found).retain is not CacheScorer.retain:
            raise ValueError(
                f"scorer={self.scorer!r} of method {self.name!r} must name another method, one that does no more than "
                "score cached entries"
            )
        defaults = CacheScorer.__dataclass_fields__
        for option in ("keep", "entries"):
            if getattr(found, option) != defaults[option].default:
                raise ValueError(f"scorer={self.scorer!r} sets {option}, which belongs to {self.name!r}: set it there")
        return replace(found, keep=self.keep, entries=self.entries)

    def layer_count(self, entries: int, layer: int, depth: int) -> int:
        """Say how many of ``entries`` stay in one layer: what the other method says."""
        return self.inner.layer_count(entries, layer, depth)

    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return the scores of the other method."""
        return self.inner.score(entries, kept)


@register("pyramidkv", stage="cache", paper="arXiv 2406.02069", source="Zefan-Cai/KVCache-Factory", vectors=True)
@dataclass(frozen=True)
class PyramidKV(ScorerUser):
    """Let the number of entries fall linearly from the first layer to the last, and take the highest scores in each.

    The window of the scorer stays in every layer; the pyramid is built from the rest. Prompts of less than twice
    that rest get the same number everywhere, and the first layer of somewhat longer ones keeps everything.

    Paper: "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling".

    Attributes:
        keep: entries per head, on average over the layers.
        scorer: the method that scores, by name or with options such as ``"snapkv(window=16)"``; its budget is
            given here.
        beta: the last layer keeps the average (without the window) divided by this.
        budgets: ``"exact"`` keeps the average; ``"official"`` cuts off the step between two layers, as the
            official code does, so that most layers keep more; ``"kvpress"`` follows that library: the pyramid is
            built from all of ``keep``, each layer rounds for itself, and where the last would keep less than the
            window all keep the same.
    """

    beta: int = 20
    budgets: Literal["exact", "official", "kvpress"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.beta, bool) or not isinstance(self.beta, int) or self.beta < 1:
            raise ValueError(f"beta={self.beta!r} must be an int of at least 1: average over last layer")
        check_choice("budgets", self.budgets, ["exact", "official", "kvpress"])

    def layer_count(self, entries: int, layer: int, depth: int) -> int:
        """Say how many of ``entries`` stay in one layer."""
        average = self.keep_count(entries)
        if average >= entries or depth == 1:
            return average
        return self.layer_counts(entries, depth)[layer]

    def layer_counts(self, entries: int, depth: int) -> list[int]:
        """Say how many of ``entries`` stay in each of ``depth`` layers, two at least.

        Example:
            >>> PyramidKV(keep=40, scorer="snapkv(window=8)").layer_counts(200, 8)
            [71, 62, 53, 44, 36, 27, 18, 9]
        """
        if self.budgets == "kvpress":
            return self._rounded_counts(entries, depth)
        average = self.keep_count(entries)
        window = self._window(average, entries)
        spare, others = average - window, entries - window
        if entries < 2 * spare:
            return [average] * depth
        # Without a window to fall back on the last layer still needs an entry.
        last = max(spare // self.beta, 0 if window else 1)
        first = 2 * spare - last
        if first >= others:
            first, last = others, 2 * spare - others
        if self.budgets == "official":
            step = (first - last) // (depth - 1)
            return [window + first - layer * step for layer in range(depth)]
        weights = [first * (depth - 1) - layer * (first - last) for layer in range(depth)]
        return [window + part for part in shares(depth * spare, weights)]

    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return the scores of the other method."""
        # A window may be all that a late layer keeps; its own scorer would leave room for one entry beside it.
        window = self._window(self.keep_count(len(entries)), len(entries))
        return self.inner.score(entries, kept + 1 if kept == window else kept)

    def _window(self, average: int, entries: int) -> int:
        """Say how many entries the scorer forces among those that count."""
        own = getattr(self.inner, "window", 0)
        return fitting_window(own, average, entries) if own and self.entries == "all" else 0

    def _rounded_counts(self, entries: int, depth: int) -> list[int]:
        wanted = self.keep if isinstance(self.keep, int) else entries * self.keep
        window = int(getattr(self.inner, "window", 0))
        # Added and taken off again as in that library: halves have to round alike.
        spare = window + wanted - window
        last = spare / self.beta
        first = 2 * spare - last
        if first >= entries - window:
            first = entries - window
            last = 2 * spare - first
        if not entries >= first >= last >= window:
            first = last = wanted
        step = (first - last) / (depth - 1)
        return [min(entries, max(1, round(first - layer * step))) for layer in range(depth)]
