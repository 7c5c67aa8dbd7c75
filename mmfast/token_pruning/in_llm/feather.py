"""FEATHER: attention without rotation, and a coarse grid so that no part of the image is lost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.base import top_indices
from mmfast.token_pruning.layers import LayerEvent, LayerRequest, LayerTokens, Schedule


@register("feather", stage="in_llm", paper="arXiv 2412.13180", source="markendo/FEATHER", vectors=True)
@dataclass(frozen=True)
class Feather(Schedule):
    """Drop in two steps by attention without positions, sparing a coarse grid in the first.

    Rotary positions favour late tokens, which in an image are those at the bottom: the score is the softmax over
    the visual tokens of the last prompt token's query and their keys, neither of them rotated. In the first step
    every ``stride``-th row and column stays whatever its score; the second keeps the best of what is left.

    ``keep`` is the average over the layers; ``keep=None`` does as the official code: the best tokens *and* the
    grid, then the share of what is left squared, so that the count depends on how far both overlap.

    Paper: "Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration",
    ICCV 2025.

    Attributes:
        stride: distance of the spared rows and columns.
        drop: share that goes in the first step, for ``keep=None``.
    """

    needs = frozenset({"attention"})
    adaptive = True

    keep: int | float | None = 0.34375
    layers: tuple[int | float, ...] = (0.25, 0.5)
    fractions: tuple[float, ...] = (0.3333, 0.0208)
    stride: int = 3
    drop: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")
        if not 0.0 <= self.drop < 1.0:
            raise ValueError(f"drop={self.drop} must lie in [0, 1)")

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for queries and keys of the layer before, without rotation."""
        return LayerRequest(event.layer - 1, rotary=False, queries="last")

    def counts(self, total: int, depth: int, images: int = 1) -> list[int] | None:
        """Leave it to the data without ``keep``."""
        return None if self.keep is None else super().counts(total, depth, images)

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor:
        """Keep the grid and the best in the first step, the best in the second."""
        score = unrotated_score(tokens.view(), tokens.last_token, tokens.candidates)
        last = event.step == len(self.steps(event.depth)) - 1 and event.step > 0
        grid = torch.zeros_like(score, dtype=torch.bool) if last else on_grid(tokens, self.stride)
        if kept is not None:
            return grid_first(score, grid, kept)
        best = torch.zeros_like(grid)
        best[top_indices(score, self.best_count(score.numel(), last=last))] = True
        return (best | grid).nonzero().squeeze(-1)

    def best_count(self, alive: int, *, last: bool) -> int:
        """Say how many tokens a step keeps for their score without ``keep``, cut off as in the official code.

        Example:
            >>> Feather(drop=0.7).best_count(81, last=False), Feather(drop=0.7).best_count(31, last=True)
            (24, 2)
        """
        return max(1, int(alive * (1.0 - self.drop) ** (2 if last else 1)))


def unrotated_score(view: AttentionView, row: int, columns: Tensor) -> Tensor:
    """Average over the heads the softmax, over some columns only, of one row of logits.

    Args:
        view: queries and keys.
        row: the query.
        columns: ``[V]`` int64.

    Returns:
        float32 ``[V]``, adding up to one.

    Example:
        >>> unrotated_score(AttentionView(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4)), 2, torch.arange(2)).tolist()
        [0.5, 0.5]
    """
    logits = view.logits(torch.tensor([row], device=columns.device), masked=False)[:, 0, view.past :]
    return logits[:, columns].softmax(dim=-1).mean(dim=0)


def grid_first(score: Tensor, grid: Tensor, kept: int) -> Tensor:
    """Return ``kept`` indices, ascending: those of the grid come first, among equals the higher score.

    Args:
        score: ``[V]``.
        grid: bool ``[V]``.
        kept: how many.

    Example:
        >>> grid_first(torch.tensor([0.1, 0.9, 0.2, 0.8]), torch.tensor([True, False, True, False]), 3).tolist()
        [0, 1, 2]
    """
    order = score.sort(descending=True, stable=True).indices
    order = order[grid[order].to(torch.int8).sort(descending=True, stable=True).indices]
    return order[:kept].sort().values


def on_grid(tokens: LayerTokens, stride: int) -> Tensor:
    """Say which candidates lie on every ``stride``-th row and column of their image; bool ``[V]``.

    Where the layout is not known, a square one is assumed if the number of tokens is a square; if it is not, every
    ``stride``-th token of the image counts.

    Example:
        >>> from mmfast.tokens import Layout
        >>> four = torch.arange(4)
        >>> tokens = LayerTokens(torch.zeros(5, 2), four, four, four * 0, 4, (4,), layouts=(Layout.grid(2, 2),))
        >>> on_grid(tokens, 2).tolist()
        [True, False, False, False]
    """
    starts = torch.tensor([0, *tokens.media_totals], device=tokens.origin.device).cumsum(0)
    local = tokens.origin - starts[tokens.media]
    found = local % stride == 0
    for index, total in enumerate(tokens.media_totals):
        mine = tokens.media == index
        places, side = local[mine], math.isqrt(total)
        layout = tokens.layouts[index] if index < len(tokens.layouts) else None
        if layout is not None and layout.grid_known:
            own = places.cpu()
            spared = (layout.row[own] % stride == 0) & (layout.col[own] % stride == 0)
            found[mine] = spared.to(found.device)
        elif side * side == total:
            found[mine] = (places // side % stride == 0) & (places % side % stride == 0)
    return found
