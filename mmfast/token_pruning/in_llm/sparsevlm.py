"""SparseVLM: the words that speak of the image rate its tokens; what goes is recycled into clusters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.budget import average_of, check_keep, resolve_layer, solve_average
from mmfast.kernels.dpc_knn import dpc_knn
from mmfast.registry import register
from mmfast.token_pruning.layers import LayerDropper, LayerEvent, LayerRequest, LayerTokens
from mmfast.token_pruning.similarity import highest_first, row_blocks, sum_by_group
from mmfast.tokens import Keep

PRESETS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""Published schedules for 576 visual tokens: tokens kept after layers 2, 6 and 15 of 32, recycled ones not counted."""


@register("sparsevlm", stage="in_llm", paper="arXiv 2410.04417", source="Gumpest/SparseVLMs", vectors=True)
@dataclass(frozen=True)
class SparseVLM(LayerDropper):
    """Drop in three steps by the attention of the words that speak of the image; merge part of what goes.

    Raters are the words of the question that visual tokens resemble more than the average word; they stay the
    same for all steps. Of what a step deletes, the best rated third is merged into a few clusters
    (density peaks over nearest neighbours), which count as tokens that are left.

    ``keep=None`` takes ``schedule``; another ``keep`` scales it so that a layer reads that many on average. With
    ``positions="compact"`` merged tokens stand behind the kept ones, as in the official code; otherwise each
    takes the place of its cluster's centre.

    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025
    (version 1.5 of the code).

    Attributes:
        keep: visual tokens a layer reads on average; int = count per image, float = fraction.
        layers: layers whose input is shortened, as indices (int) or relative depths (float).
        schedule: tokens kept in each step out of ``schedule_of``, clusters not counted.
        schedule_of: visual tokens for which ``schedule`` was made; other numbers scale it.
        recycle: merge part of what is deleted.
    """

    needs = frozenset({"attention", "embeds"})
    merges = True

    keep: int | float | None = None
    layers: tuple[int | float, ...] = (0.09375, 0.21875, 0.5)
    schedule: tuple[int, ...] = PRESETS[192]
    schedule_of: int = 576
    recycle: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep(self.keep)
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "schedule", tuple(self.schedule))
        if not self.layers or len(self.layers) != len(self.schedule):
            raise ValueError(f"layers={self.layers} and schedule={self.schedule} must name the same number of steps")
        if list(self.schedule) != sorted(self.schedule, reverse=True) or not 1 <= self.schedule[0] <= self.schedule_of:
            raise ValueError(f"schedule={self.schedule} must fall and lie in 1..schedule_of={self.schedule_of}")

    def steps(self, depth: int) -> dict[int, int]:
        """Return layer -> scheduled count; steps on the same layer of a shallow model become one."""
        resolved = [resolve_layer(layer, depth) for layer in self.layers]
        if sorted(resolved) != resolved:
            raise ValueError(f"layers={self.layers} means {resolved} in a model of {depth} layers; they must ascend")
        return dict(zip(resolved, self.schedule, strict=True))

    def events(self, depth: int) -> list[LayerEvent]:
        """Return one event per step."""
        return [LayerEvent(layer, step, depth) for step, layer in enumerate(self.steps(depth))]

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for the attention of the layer before."""
        return LayerRequest(event.layer - 1)

    def notice(self, depth: int) -> str:
        """Say when ``keep`` is a fraction that the schedule cannot reach."""
        layers = list(self.steps(depth))
        least = average_of([0.0] * len(layers), layers, depth)
        if not isinstance(self.keep, float) or self.keep >= least:
            return ""
        return f"keep={self.keep:g} as an average over the layers cannot be reached; the least is {least:.3f}"

    def counts(self, total: int, depth: int, images: int = 1) -> list[int] | None:
        """Count what is left after each step, clusters included."""
        steps = self.steps(depth)
        left, alive = [], total
        for planned in steps.values():
            alive = min(alive, sum(self.scheduled(planned, total, alive)))
            left.append(alive)
        if self.keep is None:
            return left
        share = self.keep if isinstance(self.keep, float) else min(1.0, self.keep * images / total)
        if share == 1.0:
            return [total] * len(left)
        profile = [min(count / total, 1.0 - 1e-6) for count in left]
        # Cut off, but do not lose a token to the last bit of a published fraction.
        return [max(1, int(value * total + 1e-6)) for value in solve_average(share, profile, list(steps), depth)]

    def clusters(self, deleted: int) -> int:
        """Say into how many clusters some of ``deleted`` tokens are merged.

        Example:
            >>> SparseVLM().clusters(276), SparseVLM(recycle=False).clusters(276)
            (9, 0)
        """
        return pool_size(deleted) // 10 + 1 if self.recycle and deleted > 0 else 0

    def scheduled(self, planned: int, total: int, alive: int) -> tuple[int, int]:
        """Say how many tokens a step of the schedule keeps, and into how many clusters it merges.

        At least one token is deleted and one kept, as in the official code.

        Example:
            >>> SparseVLM().scheduled(300, 576, 576), SparseVLM().scheduled(300, 144, 144)
            ((300, 9), (75, 3))
        """
        kept = max(1, min(round(total / self.schedule_of * planned), alive - 1))
        return kept, self.clusters(alive - kept)

    def split(self, alive: int, left: int) -> tuple[int, int]:
        """Divide ``left`` places among kept tokens and clusters, given that ``alive`` tokens compete.

        Where little is left of much, the published number of clusters would push out the best tokens: at least
        half of what is left are kept tokens.

        Example:
            >>> SparseVLM().split(576, 309), SparseVLM().split(576, 10), SparseVLM().split(40, 1)
            ((300, 9), (5, 5), (1, 0))
        """
        clusters = self.clusters(alive - left)
        # More clusters mean fewer kept tokens, so more deleted ones, and those at times another cluster.
        while clusters < self.clusters(alive - left + clusters):
            clusters = self.clusters(alive - left + clusters)
        clusters = min(clusters, left // 2)
        return left - clusters, clusters

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor | Keep:
        """Rate, keep the best, and merge part of the rest."""
        if kept is None:
            raise ValueError(f"method {self.name!r} needs a count")
        score = self.rate(tokens)
        alive = score.numel()
        if self.keep is None:
            stay, clusters = self.scheduled(self.steps(event.depth)[event.layer], tokens.total, alive)
        else:
            stay, clusters = self.split(alive, kept)
        best, pool = best_and_pool(score, stay)
        if clusters == 0:
            return best
        states = tokens.hidden[tokens.candidates]
        merged, centres = merge_by_density(states[pool], clusters)
        slots = torch.cat([best, pool[centres]])
        if self.positions == "compact":
            # Kept tokens first, then the merged ones, in whatever slots stay.
            return Keep(slots.sort().values, torch.cat([states[best], merged]))
        features = torch.cat([torch.full_like(states[:stay], float("nan")), merged])
        slots, places = slots.sort()
        return Keep(slots, features[places])

    def rate(self, tokens: LayerTokens) -> Tensor:
        """Average over raters and heads the attention to each candidate, float32 ``[V]``."""
        rows = self.raters(tokens)
        weights = torch.zeros(tokens.hidden.shape[0], device=tokens.hidden.device)
        weights[rows] = 1.0 / rows.numel()
        return tokens.view().column_sums(weights)[tokens.candidates]

    def raters(self, tokens: LayerTokens) -> Tensor:
        """Return the positions in ``hidden`` of the raters, chosen at the first event of the prompt."""
        question = tokens.question
        # Text moves up when visual tokens before it go: raters are remembered by their place in the full prompt.
        places = tokens.places
        if places is None:
            places = torch.arange(tokens.hidden.shape[0], device=question.device)
        if "raters" not in tokens.memory:
            if tokens.embeds is None:
                raise ValueError("embeds is missing; declare it in needs")
            likeness = word_likeness(tokens.embeds[tokens.candidates], tokens.embeds[question])
            tokens.memory["raters"] = places[question[rater_places(likeness)]]
        found = torch.isin(places, tokens.memory["raters"]).nonzero().squeeze(-1)
        return found if found.numel() else question


def pool_size(deleted: int) -> int:
    """Say how many of ``deleted`` tokens, the best rated, are recycled.

    Example:
        >>> pool_size(276), pool_size(1)
        (83, 1)
    """
    return int(0.3 * deleted) + 1


def best_and_pool(score: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return the ``kept`` best rated tokens, ascending, and those next to them, best first, that are recycled.

    Args:
        score: ``[V]``.
        kept: number of tokens kept.

    Example:
        >>> [part.tolist() for part in best_and_pool(torch.tensor([0.1, 0.4, 0.3, 0.2, 0.5]), 1)]
        [[4], [1, 2]]
    """
    order = highest_first(score, score.numel())
    return order[:kept].sort().values, order[kept : kept + pool_size(score.numel() - kept)]


def word_likeness(visual: Tensor, words: Tensor) -> Tensor:
    """Average over visual tokens the softmax, over words, of their dot products.

    Args:
        visual: ``[V, D]`` embeddings.
        words: ``[T, D]`` embeddings.

    Returns:
        float32 ``[T]``.

    Example:
        >>> word_likeness(torch.eye(2), torch.zeros(2, 2)).tolist()
        [0.5, 0.5]
    """
    rows, columns = visual.float(), words.float().T
    total = torch.zeros(columns.shape[1], device=visual.device)
    for part in row_blocks(rows.shape[0], columns.shape[1]):
        total += (rows[part] @ columns).softmax(dim=-1).sum(dim=0)
    return total / rows.shape[0]


def rater_places(likeness: Tensor) -> Tensor:
    """Return the words above the mean; all of them where none is.

    Example:
        >>> rater_places(torch.tensor([0.1, 0.6, 0.3])).tolist(), rater_places(torch.tensor([0.5, 0.5])).tolist()
        ([1], [0, 1])
    """
    above = (likeness > likeness.mean()).nonzero().squeeze(-1)
    return above if above.numel() else torch.arange(likeness.numel(), device=likeness.device)


def merge_by_density(states: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster tokens around density peaks and average each cluster.

    A token's density falls with its distance to its nearest neighbours; centres are dense and far from
    anything denser. Equal densities, which the official code tells apart by chance, are told apart by the index,
    the lower counting as denser.

    Args:
        states: ``[m, D]``.
        clusters: number of clusters, at most m.

    Returns:
        ``[clusters, D]`` means in the dtype of ``states``, the best centre first, and ``[clusters]`` int64 places of
        the centres.

    Example:
        >>> merged, centres = merge_by_density(torch.tensor([[0.0], [2.0], [10.0], [12.0]]), 2)
        >>> merged.squeeze(-1).round().tolist(), centres.tolist()
        ([1.0, 11.0], [0, 2])
    """
    values = states.float()
    found = dpc_knn(values[None], clusters)
    centres, owner = found.centres[0], found.owner[0]
    sizes = torch.bincount(owner, minlength=clusters)
    merged = sum_by_group(values, owner, clusters) / (sizes[:, None] + 1e-6)
    return merged.to(states.dtype), centres
