"""TopV: keep the tokens that can stand in for the others most cheaply."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import top_indices
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.token_pruning.layers import DropOnce, LayerEvent, LayerTokens
from mmfast.token_pruning.similarity import normalised, row_blocks

_REACH = 0.25
"""Width of the Gaussian of the distance between two patches, in sides of the picture."""
_DEAREST = 3.0
"""Upper bound of the cost, which is made of three parts between 0 and 1."""


@register("topv", stage="in_llm", paper="arXiv 2503.18278")
@dataclass(frozen=True)
class TopV(DropOnce):
    """Drop once, by what each token would contribute to an optimal transport from all tokens to all tokens.

    Moving a token (as it enters a layer) to the place of another (as the layer normalises it) costs the distance
    of their features, how far apart they lie in the picture, and how far the moved one lies from its centre. The
    contribution of a token is what it moves in the transport plan, weighted with how cheap that is: its mere mass is
    prescribed, and the distance from the centre would not show in it. Part of the budget goes to an even sample
    of what would be dropped. No attention is read. Written from the paper, of which no code is known: weights
    and widths are our own.

    Paper: "TopV: Compatible Token Pruning with Inference Time Optimization for Fast and Low-Memory Multimodal
    Vision Language Model", CVPR 2025.

    Attributes:
        iterations: rounds of Sinkhorn's algorithm.
        smoothness: weight of the entropy; the smaller, the more each token moves to the cheapest places alone.
        recovered: share of the budget for the even sample, in [0, 1).
    """

    needs = frozenset({"layer_norm"})
    reads_question = False

    iterations: int = 3
    smoothness: float = 0.1
    recovered: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be at least 1")
        if not self.smoothness >= 0.05:
            raise ValueError(f"smoothness={self.smoothness} must be at least 0.05, or single precision does not do")
        if not 0.0 <= self.recovered < 1.0:
            raise ValueError(f"recovered={self.recovered} must lie in [0, 1)")

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor:
        """Keep the tokens of largest contribution, and a sample of the others."""
        if kept is None or tokens.normed is None:
            raise ValueError(f"method {self.name!r} needs a count and the normalised input of the layer")
        own = tokens.candidates
        centres, picture = places_of(tokens)
        cost = transport_cost(tokens.hidden[own], tokens.normed[own], centres, picture)
        worth = transport_contribution(cost, own.numel(), self.iterations, self.smoothness, own.device)
        return with_sample(worth, kept, self.recovered)


def places_of(tokens: LayerTokens) -> tuple[Tensor, Tensor]:
    """Return the centre of each candidate's patch and the picture it belongs to.

    Returns:
        float32 ``[V, 2]`` centres in fractions of width and height, the middle where nothing is known, and int64
        ``[V]`` numbers of pictures: images, or frames of videos.

    Example:
        >>> from mmfast.tokens import Layout
        >>> place = torch.arange(2)
        >>> layouts = (Layout.grid(1, 2),)
        >>> places_of(LayerTokens(torch.zeros(2, 4), place, place, place * 0, 2, (2,), layouts=layouts))
        (tensor([[0.2500, 0.5000],
                [0.7500, 0.5000]]), tensor([0, 0]))
    """
    origin, media = tokens.origin.cpu(), tokens.media.cpu()
    centres = torch.full((origin.numel(), 2), 0.5)
    frame = torch.zeros_like(origin)
    before = 0
    for index, (layout, total) in enumerate(zip(tokens.layouts, tokens.media_totals, strict=False)):
        mine = media == index
        own = origin[mine] - before
        before += total
        frame[mine] = layout.frame[own]
        if layout.grid_known:
            # Every tile, the whole image included, covers the picture with a grid of its own.
            number = layout.tile.unique(return_inverse=True)[1]
            cells = torch.stack([layout.col, layout.row], dim=-1)
            sides = torch.zeros(int(number.max()) + 1, 2, dtype=cells.dtype)
            sides.scatter_reduce_(0, number[:, None].expand_as(cells), cells + 1, "amax")
            centres[mine] = ((cells + 0.5) / sides[number])[own]
    # Frames are numbered per video: numbers of different media must not meet.
    picture = torch.stack([media, frame], dim=-1).unique(dim=0, return_inverse=True)[1]
    device = tokens.candidates.device
    return centres.to(device), picture.to(device)


def transport_cost(source: Tensor, target: Tensor, centres: Tensor, picture: Tensor) -> Callable[[slice], Tensor]:
    """Prepare the cost of moving tokens to the places of tokens.

    Args:
        source: ``[N, D]`` features of what is moved; only their direction counts.
        target: ``[N, D]`` features of the places.
        centres: ``[N, 2]`` float32 places in fractions of the picture's sides.
        picture: ``[N]`` int64 picture of each token; other pictures are as far away as can be.

    Returns:
        A function from a block of R sources to their costs, float32 ``[R, N]`` between 0 and 3.

    Example:
        >>> corners = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> cost = transport_cost(torch.eye(2), torch.eye(2), corners, torch.tensor([0, 0]))
        >>> cost(slice(0, 2)).round(decimals=2)
        tensor([[1.0000, 2.7100],
                [2.7100, 1.0000]])
    """
    source, target = normalised(source), normalised(target)
    aside = (centres - 0.5).norm(dim=-1) / math.sqrt(0.5)

    def rows(part: slice) -> Tensor:
        # Of unit vectors, half the distance lies between 0 and 1.
        features = (2.0 - 2.0 * source[part] @ target.T).clamp_min(0.0).sqrt() / 2.0
        apart = 1.0 - torch.exp(-torch.cdist(centres[part], centres).square() / (2.0 * _REACH**2))
        apart = apart.masked_fill(picture[part, None] != picture, 1.0)
        cost: Tensor = features + apart + aside[part, None]
        return cost

    return rows


def transport_contribution(
    cost: Callable[[slice], Tensor],
    total: int,
    iterations: int,
    smoothness: float,
    device: torch.device | None = None,
) -> Tensor:
    """Solve an entropic transport between equal masses and weigh what each source moves with how cheap it is.

    Args:
        cost: from a block of sources to their costs ``[R, N]``, at most 3.
        total: number N of sources and of targets.
        iterations: rounds of Sinkhorn's algorithm; each ends with the targets, so that all are filled.
        smoothness: weight of the entropy.
        device: where the costs are.

    Returns:
        float32 ``[N]``: what a source moves to each target times what that costs less than 3, added up.

    Example:
        >>> costs = torch.tensor([[0.0, 1.0], [1.0, 2.0]])
        >>> transport_contribution(lambda part: costs[part], 2, 3, 1.0)
        tensor([1.2500, 0.7500])
    """
    blocks = list(row_blocks(total, total))
    # What fits into one block is held; of more, the costs are computed anew in every round.
    held = cost(blocks[0]) if len(blocks) == 1 else None

    def costs_of(part: slice) -> Tensor:
        return cost(part) if held is None else held

    given, into = torch.empty(total, device=device), torch.ones(total, device=device)
    for _ in range(iterations):
        received = torch.zeros_like(into)
        for part in blocks:
            kernel = torch.exp(costs_of(part) / -smoothness)
            given[part] = 1.0 / (total * (kernel @ into))
            received += given[part] @ kernel
        into = 1.0 / (total * received)
    worth = torch.empty_like(given)
    for part in blocks:
        costs = costs_of(part)
        worth[part] = given[part] * ((torch.exp(costs / -smoothness) * (_DEAREST - costs)) @ into)
    return worth


def with_sample(worth: Tensor, kept: int, share: float) -> Tensor:
    """Return the highest of ``worth`` and an even sample of the others, ``kept`` in all, ascending.

    Args:
        worth: ``[V]``.
        kept: number of indices, below V.
        share: part of them that is sampled; at least one is not.

    Example:
        >>> with_sample(torch.tensor([9.0, 0.0, 1.0, 2.0, 8.0]), 3, 0.4).tolist()
        [0, 2, 4]
    """
    sampled = min(round(share * kept), kept - 1)
    best = top_indices(worth, kept - sampled)
    rest = torch.ones_like(worth, dtype=torch.bool)
    rest[best] = False
    others = rest.nonzero().squeeze(-1)
    evenly = uniform_subset(others.numel(), sampled).to(worth.device)
    return torch.cat([best, others[evenly]]).sort().values
