"""FitPrune: a few tokens at almost every layer, by a table fitted to the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from mmfast.budget import LanguageShape, check_keep, prefill_flops, solve_average
from mmfast.registry import register
from mmfast.token_pruning.base import check_choice
from mmfast.token_pruning.calibrating import Bench
from mmfast.token_pruning.layers import LayerEvent, LayerRequest, LayerScorer, LayerTokens

# Tokens deleted in each layer of LLaVA-1.5-7B (32 layers, 576 tokens), by the share of computation saved.
TABLES = {
    40: "0 1 21 13 14 11 41 53 29 15 14 5 1 4 5 1 26 1 13 28 6 27 2 1 0 0 1 1 2 0 0 0",
    50: "3 7 49 24 29 17 59 41 26 8 10 6 2 5 7 2 30 3 13 27 5 23 2 1 0 0 1 1 2 0 0 0",
    60: "14 33 89 36 36 20 55 21 18 4 7 5 2 5 7 4 26 5 11 24 4 18 2 1 0 0 1 0 1 0 0 0",
    70: "48 79 118 41 33 17 36 9 9 2 3 2 1 3 4 8 18 7 8 20 4 13 2 1 0 0 1 0 1 0 0 0",
    80: "128 127 118 35 26 8 13 3 2 1 0 0 0 2 1 8 7 8 5 11 2 6 1 1 0 0 0 1 0 0 0 0",
    90: "262 153 80 19 13 1 2 0 0 0 0 0 0 0 0 1 1 2 1 2 0 1 0 0 0 0 0 1 0 0 0 0",
}
_TABLE_TOKENS = 576


@register("fitprune", stage="in_llm", paper="arXiv 2409.10197", source="ywh187/FitPrune", vectors=True)
@dataclass(frozen=True)
class FitPrune(LayerScorer):
    """Delete a few visual tokens in almost every layer, as many as a table says.

    A token goes when both visual tokens and the question look little at it: the score is the product of what
    either gives to it, taking the largest attention over the heads. The official code deletes inside the layer,
    after its attention; deleting before the next layer leaves the same states.

    The published tables are those of LLaVA-1.5-7B; for other depths they are interpolated over the relative
    depth, and :func:`mmfast.calibrate` fits one to a model.

    Paper: "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models",
    AAAI 2025.

    Attributes:
        keep: visual tokens a layer reads on average; None takes the table as it stands.
        reduction: which published table, by the percentage of computation it saves.
        deletes: a table of one's own, one count per layer; empty for a published one.
        deletes_of: how many visual tokens the table was made for.
    """

    needs = frozenset({"attention"})

    keep: int | float | None = None
    reduction: Literal[40, 50, 60, 70, 80, 90] = 50
    deletes: tuple[int, ...] = ()
    deletes_of: int = _TABLE_TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep(self.keep)
        check_choice("reduction", self.reduction, list(TABLES))
        object.__setattr__(self, "deletes", tuple(self.deletes))
        if any(value < 0 for value in self.deletes) or sum(self.deletes) > self.deletes_of:
            raise ValueError(
                f"deletes={self.deletes} must be counts that add up to at most deletes_of={self.deletes_of}"
            )

    def events(self, depth: int) -> list[LayerEvent]:
        """Return one event before every layer but the first."""
        return [LayerEvent(layer, layer - 1, depth) for layer in range(1, depth)]

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for the attention of the layer before."""
        return LayerRequest(event.layer - 1)

    def fractions(self, depth: int) -> list[float]:
        """Return what the table leaves before each layer but the first.

        Example:
            >>> [round(value, 2) for value in FitPrune(deletes=(1, 2, 0), deletes_of=4).fractions(3)]
            [0.75, 0.25]
        """
        table = self.deletes or tuple(int(value) for value in TABLES[self.reduction].split())
        left = [1.0 - gone / self.deletes_of for gone in accumulate((0, *table))]
        return [_at(left, layer / depth) for layer in range(1, depth)]

    def counts(self, total: int, depth: int, images: int = 1) -> list[int] | None:
        """Round the table, or solve it for ``keep``."""
        left = self.fractions(depth)
        if self.keep is not None:
            share = self.keep if isinstance(self.keep, float) else min(1.0, self.keep * images / total)
            # A table may leave a layer untouched at first, and what is not touched cannot be scaled.
            left = solve_average(share, [min(value, 1.0 - 1e-6) for value in left], list(range(1, depth)), depth)
        return [max(1, round(value * total)) for value in left]

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Multiply what visual tokens and the question give."""
        own, cross = scores(tokens)
        return own * cross

    def calibrated(self, bench: Bench, keep: int | float | None) -> FitPrune:
        """Fit the table to a model.

        Args:
            bench: the model and its sample prompts.
            keep: share of the computation to keep; None for half.

        Raises:
            ValueError: if ``keep`` is a count, or the prompts have no visual tokens.
        """
        if isinstance(keep, int):
            raise ValueError(f"keep={keep} must be a fraction (float in (0, 1)): the share of computation to keep")
        seen: dict[int, list[tuple[int, Tensor, Tensor]]] = {}

        def look(tokens: LayerTokens, event: LayerEvent) -> None:
            own, cross = scores(tokens)
            seen.setdefault(event.layer, []).append((tokens.total, own.cpu(), cross.cpu()))

        bench.watch(look)
        sizes = Counter(total for entries in seen.values() for total, *_ in entries)
        if not sizes:
            raise ValueError("the sample prompts have no visual tokens; give prompts with images")
        total = sizes.most_common(1)[0][0]
        maps = []
        for layer in sorted(seen):
            same = [(own, cross) for count, own, cross in seen[layer] if count == total]
            maps.append(tuple(torch.stack(parts).mean(dim=0) for parts in zip(*same, strict=True)))
        deletes = fit_deletes([(own, cross) for own, cross in maps], bench.shape, 0.5 if keep is None else keep)
        return replace(self, keep=None, deletes=tuple(deletes), deletes_of=total)


def scores(tokens: LayerTokens) -> tuple[Tensor, Tensor]:
    """Say how much visual tokens and the question look at each candidate, largest head by head.

    Returns:
        float32 ``[V]`` each: the mean over visual rows, and the sum over the rows of the question.

    Example:
        >>> from mmfast.token_pruning.attention import AttentionView
        >>> both = torch.arange(2)
        >>> view = AttentionView(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))
        >>> tokens = LayerTokens(torch.zeros(3, 8), both, both, both * 0, 2, (2,), attention=view)
        >>> [[round(value, 4) for value in part.tolist()] for part in scores(tokens)]
        [[0.75, 0.25], [0.3333, 0.3333]]
    """
    view, visual = tokens.view(), tokens.candidates
    rows = torch.zeros(tokens.hidden.shape[0], device=tokens.hidden.device)
    looking, asking = rows.clone(), rows.clone()
    looking[visual] = 1.0 / visual.numel()
    asking[tokens.question] = 1.0
    own = view.column_sums(looking, heads="max")[visual]
    return own, view.column_sums(asking, heads="max")[visual]


def fit_deletes(maps: Sequence[tuple[Tensor, Tensor]], shape: LanguageShape, keep: float) -> list[int]:
    """Find how many tokens each layer may delete while little attention is lost.

    For a tolerance, a layer deletes the largest set of tokens of lowest product whose share of either sum is
    within it; the smallest tolerance (to 0.01) that saves enough is taken.

    Args:
        maps: per layer but the last, what visual tokens and the question give to each token, ``[N]`` both.
        shape: sizes of the language model.
        keep: share of the computation on visual tokens to keep.

    Returns:
        One count per layer, 0 for the last.

    Example:
        >>> shape = LanguageShape(2, 8, 16, 1, 1, 8)
        >>> flat = torch.tensor([0.1, 0.2, 0.3, 0.4])
        >>> fit_deletes([(flat, flat)], shape, 0.8)
        [2, 0]
    """
    total = int(maps[0][0].numel())
    full = prefill_flops(shape, [total] * shape.layers)
    low, high = 0.0, 1.0
    best = _deletes(maps, high)
    while high - low > 0.01:
        middle = (low + high) / 2
        tried = _deletes(maps, middle)
        alive = [total - gone for gone in accumulate((0, *tried))][: shape.layers]
        if prefill_flops(shape, alive) <= keep * full:
            high, best = middle, tried
        else:
            low = middle
    return [*best, 0]


def _deletes(maps: Sequence[tuple[Tensor, Tensor]], tolerance: float) -> list[int]:
    alive = torch.ones(maps[0][0].numel(), dtype=torch.bool)
    counts = []
    for own, cross in maps:
        places = alive.nonzero().squeeze(-1)
        order = places[(own[places] * cross[places]).sort(stable=True).indices]
        allowed = min(int((part[order].cumsum(0) <= tolerance * part.sum() + 1e-9).sum()) for part in (own, cross))
        # One token always stays.
        allowed = min(allowed, places.numel() - 1)
        alive[order[:allowed]] = False
        counts.append(allowed)
    return counts


def _at(left: Sequence[float], depth: float) -> float:
    """Interpolate what is left at a relative depth."""
    place = depth * (len(left) - 1)
    before = min(int(place), len(left) - 2)
    share = place - before
    return left[before] * (1 - share) + left[before + 1] * share
