"""gamma-MoD: one router for all converted layers lets any token, visual or text, skip a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmfast.budget import check_keep, count
from mmfast.registry import register
from mmfast.token_pruning.base import top_indices
from mmfast.token_pruning.in_llm.p_mod import mixture_layer
from mmfast.token_pruning.layers import LayerBypass, LayerTokens, Route
from mmfast.token_pruning.weights import Lesson, check_path, prepared, taught

AUXILIARY_WEIGHT = 0.01
"""Factor of the routers' loss, added up over the layers, beside that of the answer."""


@register(
    "gamma_mod",
    stage="in_llm",
    paper="arXiv 2410.13859",
    source="Yaxin9Luo/Gamma-MOD",
    vectors=True,
    training_free=False,
)
@dataclass(frozen=True)
class GammaMoD(LayerBypass):
    """Let tokens skip the converted layers by the probability p that their router gives them.

    Tokens of p above ``threshold`` take part, and p multiplies what the feed-forward part adds to them;
    the others pass unchanged. That is the paper's rule, which leaves the count to the data, may skip
    text as well, and lets a generated token with p below one half skip a layer. With ``keep`` all text
    and everything generated take part, as the text of the question does in training, and of the visual
    tokens those of the largest p. The official code renumbers positions in each converted layer; here tokens
    keep theirs. Without ``weights`` the router is random (mechanics only).

    In training the router learns to foresee who takes part (:func:`router_loss`): with ``keep`` the same tokens as in
    use, without it all text and half of the visual tokens (:func:`training_route`).

    Weights: ``router.weight`` ``[2, D]``; row 1 is "take part".

    Paper: "gamma-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models",
    ICLR 2025.

    Attributes:
        keep: visual tokens a converted layer processes; int = count per image, None = by the threshold.
        threshold: least probability of a token that takes part, for ``keep=None``; in [0, 1).
        dense: layers that stay whole, negative ones counted from the end; those of the paper's
            attention ranks (see :func:`attention_rank`) by default.
        weights: path of a safetensors file with the trained router; empty = untrained.
    """

    routes_text = True
    routes_decode = True
    adaptive = True
    needs = frozenset({"layer_norm"})

    keep: int | float | None = None
    threshold: float = 0.005
    dense: tuple[int, ...] = (0, 1, 2, -1)
    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep(self.keep)
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"threshold={self.threshold!r} must lie in [0, 1), for it is a probability")
        object.__setattr__(self, "dense", tuple(self.dense))
        if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in self.dense):
            raise ValueError(f"dense={self.dense!r} must hold layer indices (int), negative ones counted from the end")
        check_path(self.weights)

    def layers_of(self, depth: int) -> list[int]:
        """Return all layers that are not ``dense``."""
        if self.keep == 1.0 and isinstance(self.keep, float):
            return []
        whole = {layer % depth for layer in self.dense if -depth <= layer < depth}
        layers = [layer for layer in range(depth) if layer not in whole]
        if not layers:
            raise ValueError(f"dense={self.dense} leaves no layer to convert in a model of {depth} layers; name fewer")
        return layers

    def keep_counts(self, visual: int, text: int, depth: int, images: int = 1) -> list[int] | None:
        """Count all text and the visual tokens of ``keep``; None where the threshold decides."""
        if self.keep is None:
            return None
        part = self._kept(visual, images) if visual else 0
        converted = set(self.layers_of(depth))
        return [text + (part if layer in converted else visual) for layer in range(depth)]

    def route(self, tokens: LayerTokens, layer: int, depth: int) -> Route:
        """Let the likely tokens take part, weighed by their probability."""
        everything = torch.arange(tokens.candidates.numel(), device=tokens.hidden.device)
        kept = None if self.keep is None else self._kept(tokens.total, len(tokens.media_totals))
        if kept is not None and kept >= tokens.total:
            return Route(everything)
        if tokens.normed is None:
            raise ValueError("the hidden states behind the layer's norm are missing; name 'layer_norm' in needs")
        logits = self._logits(tokens.normed[tokens.candidates])
        probability = logits.softmax(dim=-1)[..., 1]
        part = self._part(probability.detach(), tokens, kept)
        if tokens.lesson is not None:
            tokens.lesson.note("router", (layer, router_loss(logits, part)))
        return Route(part.nonzero().squeeze(-1), gate=probability)

    def _part(self, probability: Tensor, tokens: LayerTokens, kept: int | None) -> Tensor:
        visual = tokens.origin >= 0
        if kept is None and tokens.lesson is not None:
            return training_route(probability, ~visual)
        if kept is None:
            part = probability > self.threshold
            if not bool(part.any()):
                part[top_indices(probability, 1)] = True
            return part
        part = ~visual
        places = visual.nonzero().squeeze(-1)
        part[places[top_indices(probability[places], kept)]] = True
        return part

    def probability(self, normed: Tensor) -> Tensor:
        """Return the probability that tokens take part, which is also the gate of those that do.

        Args:
            normed: ``[..., D]`` hidden states behind the layer's input norm.

        Returns:
            float32 ``[...]``.
        """
        probability: Tensor = self._logits(normed).softmax(dim=-1)[..., 1]
        return probability

    def _logits(self, normed: Tensor) -> Tensor:
        logits: Tensor = prepared(self, GammaRouter, (normed.shape[-1],), normed.device)(normed)
        return logits

    def learned(self, width: int, depth: int, device: torch.device) -> GammaRouter:
        """Return the router."""
        return taught(self, GammaRouter, (width,), device)

    def training_loss(self, lesson: Lesson) -> Mapping[str, Tensor]:
        """Add up over the layers what the router did not foresee, on average over the prompts."""
        layers: dict[int, list[Tensor]] = {}
        for layer, loss in lesson.noted("router"):
            layers.setdefault(layer, []).append(loss)
        means = [torch.stack(losses).mean() for losses in layers.values()]
        return {"router": AUXILIARY_WEIGHT * torch.stack(means).sum() if means else torch.zeros(())}

    def decode_route(self, normed: Tensor, layer: int) -> Tensor | None:
        """Weigh new tokens by their probability, and let those below one half go around.

        With ``keep`` all of them take part, weighed alike.
        """
        probability = self.probability(normed)
        return probability if self.keep is not None else torch.where(probability >= 0.5, probability, 0.0)

    def _kept(self, total: int, images: int) -> int:
        keep = 1.0 if self.keep is None else self.keep
        return count(keep * images if isinstance(keep, int) else keep, total)


class GammaRouter(nn.Module):
    """The linear router shared by all converted layers.

    Args:
        width: hidden size D.

    Example:
        >>> GammaRouter(8)(torch.zeros(5, 8)).softmax(-1)[:, 1].tolist()
        [0.5, 0.5, 0.5, 0.5, 0.5]
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 2, bias=False)

    def forward(self, normed: Tensor) -> Tensor:
        """Return float32 logits ``[..., 2]`` of "skip" and "take part" for states ``[..., D]``."""
        logits: Tensor = self.router(normed.to(self.router.weight.dtype))
        return logits.float()


def training_route(probability: Tensor, protected: Tensor, skip: float = 0.5) -> Tensor:
    """Choose who takes part in training: a share of the unprotected tokens skips.

    Protected tokens (question and answer) gain 1 in the choice and so come first; the gate stays p.

    Args:
        probability: ``[n]`` of ONE sample.
        protected: ``[n]`` bool.
        skip: share of the unprotected tokens that skip, in [0, 1).

    Returns:
        bool ``[n]``; ``ceil(n - skip * unprotected)`` are True.

    Example:
        >>> training_route(torch.tensor([0.2, 0.9, 0.1, 0.3]), torch.tensor([False, False, True, True])).tolist()
        [False, True, True, True]
    """
    total = probability.numel()
    unprotected = total - int(protected.sum())
    # As in the paper's code: a capacity first, of which the number is rounded up.
    kept = math.ceil(total * (1 - skip * unprotected / total))
    part = torch.zeros_like(protected)
    part[top_indices(probability.detach() + protected.float(), kept)] = True
    return part


def gamma_mod_layer(
    hidden: Tensor,
    logits: Tensor,
    part: Tensor,
    attend: Callable[[Tensor, Tensor], Tensor],
    feed: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Run a converted layer on ONE sample, in training or not.

    Args:
        hidden: ``[n, D]`` input of the layer.
        logits: ``[n, 2]`` of the router.
        part: ``[n]`` bool, who takes part.
        attend: as in :func:`~mmfast.token_pruning.in_llm.p_mod.mixture_layer`.
        feed: the same.

    Returns:
        ``[n, D]`` output, and the router's loss (a scalar, to be weighed by :data:`AUXILIARY_WEIGHT`).

    Example:
        >>> part = torch.tensor([True, False])
        >>> gamma_mod_layer(torch.ones(2, 1), torch.zeros(2, 2), part, lambda x, _: x, lambda x: x)[0].tolist()
        [[3.0], [1.0]]
    """
    gate = logits.float().softmax(dim=-1)[:, 1]
    output = mixture_layer(hidden, part.nonzero().squeeze(-1), gate, torch.ones_like(gate), attend, feed)
    return output, router_loss(logits, part)


def router_loss(logits: Tensor, part: Tensor) -> Tensor:
    """Teach the router to foresee who takes part: the mean cross-entropy against ``part``.

    Args:
        logits: ``[n, 2]``.
        part: ``[n]`` bool.

    Example:
        >>> round(router_loss(torch.zeros(4, 2), torch.ones(4, dtype=torch.bool)).item(), 4)
        0.6931
    """
    return functional.cross_entropy(logits.float(), part.long())


def attention_rank(attention: Tensor) -> Tensor:
    """Return the numerical rank of the causal attention of each head, self-attention left out.

    Layers whose mean rank over heads and a few hundred samples is low are the ones to convert.

    Args:
        attention: ``[H, n, n]`` post-softmax.

    Returns:
        int64 ``[H]``.

    Example:
        >>> attention_rank(torch.ones(1, 4, 4)).tolist()
        [3]
    """
    ranks: Tensor = torch.linalg.matrix_rank(attention.float().tril(diagonal=-1))
    return ranks
