"""p-MoD: each deep layer processes the visual tokens its router picks; the others go around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from mmfast.budget import check_keep, solve_average, truncated_count
from mmfast.registry import register
from mmfast.token_pruning.base import check_choice, top_indices
from mmfast.token_pruning.layers import LayerBypass, LayerTokens, Route
from mmfast.token_pruning.weights import Lesson, check_path, prepared, taught

Decay = Literal["cosine", "linear"]


@register("p_mod", stage="in_llm", paper="arXiv 2412.04449", source="MCG-NJU/p-MoD", vectors=True, training_free=False)
@dataclass(frozen=True)
class PMoD(LayerBypass):
    """Let fewer and fewer visual tokens through the layers, those the layer's router weighs most.

    The router's weight multiplies what the feed-forward part adds to a token that takes part, and the
    whole state of one that does not. Text always takes part, and so does everything generated. The
    schedule decays with depth: layers that would process more than 85 % process everything, no layer
    processes less than 15 %. Another ``keep`` scales the ratios of the routed layers alike (on a
    logarithmic scale) and leaves the others whole. Without ``weights`` the routers are at their start:
    all weights 1, so the first tokens are taken (mechanics only).

    Training is what happens in use: both factors of a layer carry gradients to its router, and no loss is added.

    Weights: ``layers.<l>.weight`` ``[1, D]`` and ``layers.<l>.bias`` ``[1]`` for each routed layer l
    (8 to 31 of 32).

    Paper: "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay", ICCV 2025.

    Attributes:
        keep: visual tokens a layer processes on average over all layers; int = count per image.
        decay: shape of the schedule.
        weights: path of a safetensors file with the trained routers; empty = untrained.
    """

    keep: int | float = 0.5375
    decay: Decay = "cosine"
    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_choice("decay", self.decay, ["cosine", "linear"])
        check_path(self.weights)

    def layers_of(self, depth: int) -> list[int]:
        """Return the layers of the schedule that do not process everything."""
        layers = list(_routed(depth, self.decay))
        if self.keep == 1.0 and isinstance(self.keep, float):
            return []
        if not layers:
            raise ValueError(f"p_mod has nothing to route in a model of depth {depth}: its first layers stay whole")
        return layers

    def notice(self, depth: int) -> str:
        """Say when ``keep`` is a fraction that no setting of the schedule reaches."""
        whole = depth - len(_routed(depth, self.decay))
        if not isinstance(self.keep, float) or self.keep >= whole / depth:
            return ""
        return (
            f"keep={self.keep:g} as an average over the layers cannot be reached: {whole} of {depth} layers process "
            f"every token, so the least, {whole / depth:.3f}, is what it comes to; reduce before the LLM for less"
        )

    def ratios(self, total: int, depth: int, images: int = 1) -> dict[int, float]:
        """Return routed layer -> share of the visual tokens it processes, for this ``keep``."""
        share = self.keep if isinstance(self.keep, float) else min(1.0, self.keep * images / max(total, 1))
        return _solved(share, depth, self.decay)

    def keep_counts(self, visual: int, text: int, depth: int, images: int = 1) -> list[int]:
        """Count all text and the ratio of the visual tokens, cut off."""
        ratios = self.ratios(visual, depth, images)
        return [text + (_part(ratios.get(layer, 1.0), visual) if visual else 0) for layer in range(depth)]

    def route(self, tokens: LayerTokens, layer: int, depth: int) -> Route:
        """Let the tokens of the largest weights take part."""
        ratio = self.ratios(tokens.total, depth, len(tokens.media_totals))[layer]
        if ratio >= 1.0:
            return Route(torch.arange(tokens.candidates.numel(), device=tokens.hidden.device))
        states = tokens.hidden[tokens.candidates]
        routers = prepared(self, PModRouters.of, (states.shape[1], depth, self.decay == "linear"), states.device)
        weights = routers(states, layer)
        return Route(top_indices(weights.detach(), _part(ratio, tokens.total)), gate=weights, skipped=weights)

    def learned(self, width: int, depth: int, device: torch.device) -> PModRouters:
        """Return the routers."""
        return taught(self, PModRouters.of, (width, depth, self.decay == "linear"), device)

    def training_loss(self, lesson: Lesson) -> Mapping[str, Tensor]:
        """Add nothing."""
        return {}


class PModRouters(nn.Module):
    """One linear router per routed layer, zero at the start, whose weights lie in 0.8 to 1.2.

    Args:
        width: hidden size D.
        layers: the routed layers.

    Example:
        >>> PModRouters(8, [3])(torch.randn(5, 8), 3).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, width: int, layers: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(layer): nn.Linear(width, 1) for layer in layers})
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @staticmethod
    def of(width: int, depth: int, linear: int) -> PModRouters:
        """Build the routers of a model."""
        return PModRouters(width, list(_routed(depth, "linear" if linear else "cosine")))

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        """Weigh tokens.

        Args:
            hidden: ``[..., D]`` input of the layer, before its norm.
            layer: the layer.

        Returns:
            float32 ``[...]``.
        """
        logits: Tensor = self.layers[str(layer)](hidden.to(next(self.parameters()).dtype))
        return tanh_norm(logits.squeeze(-1))


def tanh_norm(logits: Tensor, scale: float = 0.2, shift: float = 1.0) -> Tensor:
    """Turn router outputs into weights around ``shift``: ``scale * tanh(x) + shift`` in float32.

    Example:
        >>> tanh_norm(torch.zeros(2)).tolist()
        [1.0, 1.0]
    """
    return scale * torch.tanh(logits.float()) + shift


def prd_ratios(
    depth: int, decay: Decay = "cosine", *, mean: float = 0.5, highest: float = 0.85, lowest: float = 0.15
) -> list[float]:
    """Return the share of visual tokens each layer processes under progressive ratio decay.

    Args:
        depth: number of layers.
        decay: ``"cosine"`` or ``"linear"``.
        mean: middle of the curve.
        highest: layers above it process everything (ratio 1).
        lowest: no ratio is smaller.

    Example:
        >>> [round(ratio, 3) for ratio in prd_ratios(9)]
        [1.0, 1.0, 1.0, 0.691, 0.5, 0.309, 0.15, 0.15, 0.15]
        >>> round(sum(prd_ratios(32)) / 32, 6)
        0.5375
    """
    ratios = []
    for layer in range(depth):
        # A lone layer is a first one.
        place = layer / max(depth - 1, 1)
        raw = mean + (0.5 * math.cos(math.pi * place) if decay == "cosine" else 0.5 - place)
        ratios.append(1.0 if raw > highest else max(raw, lowest))
    return ratios


def mixture_layer(
    hidden: Tensor,
    places: Tensor,
    gate: Tensor,
    skipped: Tensor,
    attend: Callable[[Tensor, Tensor], Tensor],
    feed: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run a layer on some tokens of ONE prompt, as one compact sequence; the others go around it.

    Tokens that take part become ``u + gate * feed(u)`` with ``u = x + attend(x)``, the others
    ``skipped * x``. Differentiable in the states and in both factors.

    Args:
        hidden: ``[n, D]`` input of the layer.
        places: ``[S]`` int64, ascending: the tokens that take part.
        gate: ``[n]`` factor of what the feed-forward part adds.
        skipped: ``[n]`` factor of the state of a token that does not take part.
        attend: gives what attention adds, from the states ``[S, D]`` and their places.
        feed: gives what the feed-forward part adds, from ``[S, D]``. Both include their norms.

    Returns:
        ``[n, D]``, same dtype.

    Example:
        >>> half = torch.full((3,), 0.5)
        >>> mixture_layer(torch.ones(3, 1), torch.tensor([1]), half, half, lambda x, _: x, lambda x: x).tolist()
        [[0.5], [3.0], [0.5]]
    """
    own = hidden[places]
    middle = own + attend(own, places)
    done = middle + gate[places, None].to(hidden.dtype) * feed(middle)
    return (skipped[:, None].to(hidden.dtype) * hidden).index_copy(0, places, done)


def p_mod_layer(
    hidden: Tensor,
    visual: Tensor,
    weights: Tensor,
    ratio: float,
    attend: Callable[[Tensor, Tensor], Tensor],
    feed: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run a routed layer on ONE prompt, in training or not.

    Args:
        hidden: ``[n, D]`` input of the layer.
        visual: ``[n]`` bool; without visual tokens the layer is a plain one.
        weights: ``[n]`` router weights, of which those of visual tokens count.
        ratio: share of the visual tokens that take part.
        attend: as in :func:`mixture_layer`.
        feed: as in :func:`mixture_layer`.

    Returns:
        ``[n, D]``.

    Example:
        >>> visual = torch.tensor([False, True, True])
        >>> weights = torch.tensor([1.0, 0.5, 1.0])
        >>> p_mod_layer(torch.ones(3, 1), visual, weights, 0.5, lambda x, _: x, lambda x: x).squeeze(-1).tolist()
        [4.0, 0.5, 4.0]
    """
    factors = torch.where(visual, weights, torch.ones_like(weights))
    return mixture_layer(hidden, taking_part(visual, weights, ratio), factors, factors, attend, feed)


def taking_part(visual: Tensor, weights: Tensor, ratio: float) -> Tensor:
    """Return the places of all text and of the visual tokens of the largest weights, ascending int64.

    Example:
        >>> taking_part(torch.tensor([False, True, True]), torch.tensor([0.0, 1.0, 1.0]), 0.5).tolist()
        [0, 1]
    """
    part = ~visual
    places = visual.nonzero().squeeze(-1)
    if places.numel():
        part[places[top_indices(weights[places].detach(), _part(ratio, places.numel()))]] = True
    return part.nonzero().squeeze(-1)


def _part(ratio: float, total: int) -> int:
    return truncated_count(max(ratio, 1e-9), total)


def _routed(depth: int, decay: Decay) -> dict[int, float]:
    return {layer: ratio for layer, ratio in enumerate(prd_ratios(depth, decay)) if ratio < 1.0}


@lru_cache(maxsize=256)
def _solved(share: float, depth: int, decay: Decay) -> dict[int, float]:
    published = _routed(depth, decay)
    return dict(zip(published, solve_average(share, list(published.values()), list(published), depth), strict=True))
