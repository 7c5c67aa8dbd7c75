"""ZipVL: in each layer, only the tokens that hold most of the attention take part in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.budget import check_keep, count
from mmfast.registry import register
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.base import top_indices
from mmfast.token_pruning.before_llm.random import random_subset
from mmfast.token_pruning.layers import LayerBypass, LayerRequest, LayerTokens, Route


@register("zipvl", stage="in_llm", paper="arXiv 2410.08584")
@dataclass(frozen=True)
class ZipVL(LayerBypass):
    """Let only important visual tokens take part in attention, chosen anew in every layer.

    Important is what some probe rows look at: the last tokens of the prompt and a random sample of the others.
    With ``keep=None`` each layer takes the fewest tokens that, with the text, hold ``mass`` of the probes'
    attention. The others skip the attention of the layer, are not in its cache, and run its feed-forward part.
    Text always takes part. Written from the paper, of which no code is known.

    Paper: "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification", 2024.

    Attributes:
        keep: visual tokens that take part in each layer; int = count per image, float = fraction, None = ``mass``.
        mass: share of the probes' attention that is covered with ``keep=None``.
        recent: number of probe rows at the end of the prompt.
        sampled: number of probe rows drawn from the rest.
        seed: seed of the draw.
    """

    needs = frozenset({"attention"})
    reads_question = True
    bypass = "attention"

    keep: int | float | None = None
    mass: float = 0.975
    recent: int = 64
    sampled: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep(self.keep)
        if not 0.0 < self.mass <= 1.0:
            raise ValueError(f"mass={self.mass} must lie in (0, 1]")
        if self.recent < 1 or self.sampled < 0:
            raise ValueError(f"recent={self.recent} must be at least 1 and sampled={self.sampled} at least 0")

    def layers_of(self, depth: int) -> list[int]:
        """Return all layers, or none where every token takes part."""
        return [] if self.keep == 1.0 and isinstance(self.keep, float) else list(range(depth))

    def request(self, layer: int) -> LayerRequest:
        """Ask for the attention that the layer is about to compute."""
        return LayerRequest(layer, ahead=True)

    def route(self, tokens: LayerTokens, layer: int, depth: int) -> Route:
        """Choose by what the probe rows look at."""
        rows = probe_rows(tokens.last_token + 1, self.recent, self.sampled, self.seed, layer)
        received = probed_attention(tokens.view(), rows.to(tokens.candidates.device))
        own = received[tokens.candidates]
        kept = self._count(tokens.total, len(tokens.media_totals))
        if kept is None:
            kept = covering_count(own, float(received.sum()), self.mass)
        return Route(top_indices(own, kept))

    def _count(self, total: int, images: int) -> int | None:
        if self.keep is None:
            return None
        return count(self.keep * images if isinstance(self.keep, int) else self.keep, total)

    def keep_counts(self, visual: int, text: int, depth: int, images: int = 1) -> list[int] | None:
        """Predict the same count for all layers."""
        kept = self._count(visual, images) if visual else 0
        return None if kept is None else [text + kept] * depth


def probe_rows(length: int, recent: int, sampled: int, *seeds: int) -> Tensor:
    """Return the last ``recent`` of ``length`` rows and ``sampled`` random ones of the others, ascending.

    Example:
        >>> rows = probe_rows(10, 3, 2, 0)
        >>> rows[-3:].tolist(), rows.numel()
        ([7, 8, 9], 5)
    """
    others = max(0, length - recent)
    drawn = random_subset(others, sampled, *seeds)
    return torch.cat([drawn.sort().values, torch.arange(others, length)])


def probed_attention(view: AttentionView, rows: Tensor) -> Tensor:
    """Average what ``rows`` give to each column over rows and heads.

    Example:
        >>> view = AttentionView(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
        >>> probed_attention(view, torch.tensor([1, 3])).tolist()
        [0.375, 0.375, 0.125, 0.125]
    """
    weights = torch.zeros(view.length, device=view.query.device)
    weights[rows] = 1.0 / rows.numel()
    return view.column_sums(weights)


def covering_count(values: Tensor, whole: float, mass: float) -> int:
    """Return how many of the largest values are needed so that no more than ``1 - mass`` of the whole is missing.

    Args:
        values: ``[V]`` float32, not negative, part of what makes up the whole.
        whole: sum of everything.
        mass: share to cover.

    Returns:
        At least 1.

    Example:
        >>> covering_count(torch.tensor([1.0, 4.0, 2.0]), 10.0, 0.8), covering_count(torch.tensor([1.0]), 10.0, 0.5)
        (2, 1)
    """
    largest = values.double().sort(descending=True).values
    missing = values.double().sum() - largest.cumsum(dim=0)
    enough = missing <= (1.0 - mass) * whole
    return int((~enough).sum().clamp_max(values.numel() - 1)) + 1
