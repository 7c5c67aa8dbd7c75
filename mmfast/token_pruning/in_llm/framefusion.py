"""FrameFusion: merge tokens that repeat those of the frame before, then drop what is not looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfast.budget import check_keep, resolve_layer
from mmfast.registry import register
from mmfast.token_pruning.base import top_indices
from mmfast.token_pruning.before_llm.prunevid import check_threshold
from mmfast.token_pruning.in_llm.fastv import last_row_score
from mmfast.token_pruning.layers import DropOnce, LayerDropper, LayerEvent, LayerRequest, LayerTokens
from mmfast.token_pruning.similarity import highest_first, normalised, row_blocks, segment_sums
from mmfast.tokens import Keep


@register("framefusion", stage="in_llm", paper="arXiv 2501.01986", source="thu-nics/FrameFusion", vectors=True)
@dataclass(frozen=True)
class FrameFusion(DropOnce, LayerDropper):
    """Merge tokens into the same place of the frame before where they are alike; then drop by attention.

    With ``keep=None`` the data decide when: before each layer, from the first on, all tokens similar enough to their
    predecessor are merged into it, until few are; then what the last prompt token looks at least goes at once.
    What goes in the end is worked out so that the layers read ``cost`` of the visual tokens on average; if there is
    enough to merge, nothing is dropped. The official code does this between the attention and the feed-forward
    part of a layer, here it is done before the layer.

    With a ``keep`` both are done at one place, before ``layer``: as many similar tokens as need be are merged, and if
    that is not enough, the least looked at are dropped until exactly ``keep`` are left. A merged token counts with
    the mean attention to its members.

    A single image has no frame before, so that all is dropping.

    Paper: "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Visual Language
    Models", ICCV 2025.

    Attributes:
        layer: where ``keep`` takes effect, as index (int) or relative depth (float).
        cost: visual tokens a layer reads on average with ``keep=None``, as a fraction in (0, 1].
        threshold: least similarity of tokens that are merged, in [-1, 1].
        least: share of the tokens below which merging ends, in [0, 1].
    """

    needs = frozenset({"attention"})
    merges = True
    adaptive = True

    keep: int | float | None = None
    cost: float = 0.3
    threshold: float = 0.6
    least: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(float(self.cost), field="cost")
        check_threshold("threshold", self.threshold)
        if not 0.0 <= self.least <= 1.0:
            raise ValueError(f"least={self.least} must lie in [0, 1]")

    def events(self, depth: int) -> list[LayerEvent]:
        """Return one event per layer, or the single one where ``keep`` is given."""
        if self.keep is not None:
            return [LayerEvent(resolve_layer(self.layer, depth), 0, depth)]
        return [LayerEvent(layer, layer, depth) for layer in range(depth)]

    def request(self, event: LayerEvent) -> LayerRequest | None:
        """Ask for the row of the layer before, if there is one."""
        return LayerRequest(event.layer - 1, queries="last") if event.layer else None

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor | Keep:
        """Merge, drop, or do nothing any more."""
        if kept is None:
            return self._next(tokens, event)
        states = tokens.hidden[tokens.candidates]
        order, similarity = predecessor_similarity(states, place_of(tokens))
        merged = similarity >= self.threshold
        merged[highest_first(similarity, similarity.numel())[states.shape[0] - kept :]] = False
        fused = fuse(states, order, merged)
        if len(fused) == kept or fused.features is None or fused.source is None:
            return fused if len(fused) == kept else top_indices(last_row_score(tokens), kept)
        mass = segment_sums(last_row_score(tokens)[:, None], fused.source, len(fused))[:, 0]
        best = top_indices(mass / torch.bincount(fused.source), kept)
        return Keep(fused.indices[best], fused.features[best])

    def _next(self, tokens: LayerTokens, event: LayerEvent) -> Tensor | Keep:
        """Take the step that is due with ``keep=None``."""
        memory: dict[str, Any] = tokens.memory
        alive = tokens.candidates.numel()
        gone: list[float] = memory.setdefault("sparsity", [])
        if memory.get("done"):
            return torch.arange(alive, device=tokens.hidden.device)
        wanted = sparsity_due(gone, self.cost, event.depth)
        if memory.get("merged"):
            memory["done"] = True
            return top_indices(last_row_score(tokens), max(1, round(alive * (1 - wanted))))
        states = tokens.hidden[tokens.candidates]
        order, similarity = predecessor_similarity(states, place_of(tokens))
        merged = similarity >= self.threshold
        share = int(merged.sum()) / alive
        if share < wanted:
            gone.append(share)
            memory["merged"] = share < self.least
        else:
            memory["merged"] = memory["done"] = True
            merged[highest_first(similarity, alive)[int(wanted * alive) :]] = False
        return fuse(states, order, merged)


def sparsity_due(gone: Sequence[float], cost: float, depth: int) -> float:
    """Say what share of the tokens has to go now so that all layers read ``cost`` of them on average.

    Args:
        gone: share that went before each of the first layers.
        cost: wanted average.
        depth: number of layers, more than there are entries in ``gone``.

    Returns:
        The share, in [0, 1].

    Example:
        >>> round(sparsity_due([], 0.3, 28), 6), round(sparsity_due([0.5, 0.0], 0.3, 28), 6)
        (0.7, 0.430769)
    """
    left, read = 1.0, 0.0
    for share in gone:
        left *= 1.0 - share
        read += left
    rest = max(0.0, depth * cost - read)
    return max(0.0, 1.0 - rest / ((depth - len(gone)) * left))


def place_of(tokens: LayerTokens) -> Tensor:
    """Number the places inside the frames: tokens of a video at the same place of different frames share one.

    Returns:
        int64 ``[V]``; where the layout is not known, all are different.
    """
    if not tokens.layouts:
        return tokens.origin
    rows = [
        torch.stack([layout.tile, layout.row, layout.col, torch.zeros_like(layout.row) if crop is None else crop])
        for layout, crop in ((layout, layout.crop) for layout in tokens.layouts)
    ]
    own = torch.cat(rows, dim=1).to(tokens.origin.device)[:, tokens.origin]
    found: Tensor = torch.cat([tokens.media[None], own]).unique(dim=1, return_inverse=True)[1]
    return found


def predecessor_similarity(states: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Compare each token with the one before it at the same place.

    Args:
        states: ``[V, D]``, in the order of time.
        place: int64 ``[V]``.

    Returns:
        int64 ``[V]`` the tokens by place and then time, and float32 ``[V]``, in this order, their cosine similarity to
        the one before; -2 for the first of each place.

    Example:
        >>> order, similarity = predecessor_similarity(torch.tensor([[1.0], [2.0], [-3.0]]), torch.tensor([0, 1, 0]))
        >>> order.tolist(), similarity.tolist()
        ([0, 2, 1], [-2.0, -1.0, -2.0])
    """
    order = place.sort(stable=True).indices
    similarity = torch.full(order.shape, -2.0, device=states.device)
    for part in row_blocks(order.numel() - 1, states.shape[1]):
        before, after = order[:-1][part], order[1:][part]
        similarity[1:][part] = (normalised(states[before]) * normalised(states[after])).sum(dim=-1)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = place[order][1:] != place[order][:-1]
    return order, similarity.masked_fill(first, -2.0)


def fuse(states: Tensor, order: Tensor, merged: Tensor) -> Keep:
    """Merge each marked token into the one before it; a run of them becomes one mean.

    Args:
        states: ``[V, D]``.
        order: int64 ``[V]``, as of :func:`predecessor_similarity`.
        merged: bool ``[V]`` in this order; the first of each place is not marked.

    Returns:
        What is left, with features that are NaN where nothing was merged, and none where nothing was anywhere.

    Example:
        >>> keep = fuse(torch.tensor([[1.0], [2.0], [6.0]]), torch.arange(3), torch.tensor([False, True, False]))
        >>> keep.indices.tolist(), keep.features.tolist(), keep.source.tolist()
        ([0, 2], [[1.5], [nan]], [0, 0, 1])
    """
    if not bool(merged.any()):
        return Keep(torch.arange(order.numel(), device=order.device))
    group = (~merged).long().cumsum(dim=0) - 1
    heads, rank = order[~merged].sort()
    source = torch.empty_like(order)
    source[order] = rank.argsort()[group]
    members = torch.bincount(source)[:, None]
    means = segment_sums(states, source, heads.numel()) / members
    features = torch.where(members > 1, means, torch.nan).to(states.dtype)
    return Keep(heads, features, members[:, 0].float(), source)
