"""DART: keep what is least like a few pivots, whatever attention says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Compat, check_choice
from mmfast.token_pruning.layers import DropOnce, LayerEvent, LayerRequest, LayerTokens
from mmfast.token_pruning.similarity import normalised


@register("dart", stage="in_llm", paper="arXiv 2502.11494", source="ZichenWen1/DART", vectors=True)
@dataclass(frozen=True)
class DART(DropOnce):
    """Drop once what repeats a few pivot tokens, and keep what is least like them.

    Pivots are the visual tokens and the tokens of the question with the largest keys (L1 norm) in the layer
    before. Each in turn takes the candidates of lowest cosine similarity to it, in hidden states that have
    gone through the model's final norm, as in the official code. No attention is needed.

    ``keep`` counts everything that is left, pivots included. The official code divides the budget by the number
    of pivots, cuts off and adds the visual pivots on top, so that 128 becomes 132: ``compat="official"``.

    Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
    EMNLP 2025.

    Attributes:
        visual_pivots: pivots among the visual tokens.
        text_pivots: pivots in the question; where no text follows the image, as many visual ones instead.
        order: in which order pivots choose: ``"size"`` visual ones by descending key, then text ones;
            ``"official"`` the order in which CPython goes through a set of their places.
        compat: ``"official"`` counts as the official code does.
    """

    needs = frozenset({"attention", "final_norm"})

    visual_pivots: int = 4
    text_pivots: int = 4
    order: Literal["size", "official"] = "size"
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("order", self.order, ["size", "official"])
        check_choice("compat", self.compat, [None, "official"])
        if self.visual_pivots < 1 or self.text_pivots < 0:
            raise ValueError(
                f"visual_pivots={self.visual_pivots} must be at least 1 and text_pivots={self.text_pivots} at least 0"
            )

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for the keys of the layer before."""
        return LayerRequest(event.layer - 1, queries="last")

    def counts(self, total: int, depth: int, images: int = 1) -> list[int] | None:
        """Return what is left after the drop."""
        if self.compat is None:
            return super().counts(total, depth, images)
        wanted = self.keep * images if isinstance(self.keep, int) else (self.keep or 0.0) * total
        pivots = self.visual_pivots + self.text_pivots
        return [min(total, pivots * int(wanted // pivots) + self.visual_pivots)]

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor:
        """Choose pivots, then let each take its share."""
        if tokens.normed is None:
            raise ValueError("normed is missing; declare 'final_norm' in needs")
        view = tokens.view()
        sizes = key_sizes(view.key[:, view.past :])
        wanted = int(kept or 1)
        question = tokens.question
        asked = question[question > int(tokens.candidates[-1])]
        visual = self.visual_pivots if asked.numel() else self.visual_pivots + self.text_pivots
        visual_pivots = largest(sizes, tokens.candidates, min(visual, wanted))
        text_pivots = largest(sizes, asked, self.text_pivots)
        order = processing_order(visual_pivots.tolist(), text_pivots.tolist(), self.order)
        chosen = least_alike(tokens.normed, tokens.candidates, visual_pivots, order, wanted - visual_pivots.numel())
        places = torch.cat([visual_pivots, chosen]).sort().values
        return torch.searchsorted(tokens.candidates, places)


def key_sizes(key: Tensor) -> Tensor:
    """Add up the absolute values of each token's keys over heads and dimensions.

    Args:
        key: ``[G, n, d]``.

    Returns:
        float32 ``[n]``.

    Example:
        >>> key_sizes(torch.tensor([[[1.0, -2.0]], [[0.0, 1.0]]])).tolist()
        [4.0]
    """
    return key.float().abs().sum(dim=(0, 2))


def largest(sizes: Tensor, places: Tensor, count: int) -> Tensor:
    """Return the ``count`` places of largest size, largest first.

    Example:
        >>> largest(torch.tensor([3.0, 9.0, 1.0, 5.0]), torch.tensor([0, 2, 3]), 2).tolist()
        [3, 0]
    """
    return places[sizes[places].sort(descending=True, stable=True).indices[:count]]


def processing_order(visual: Sequence[int], text: Sequence[int], order: str) -> list[int]:
    """Return the order in which pivots choose.

    Example:
        >>> processing_order([9, 3], [40], "size")
        [9, 3, 40]
    """
    every = [*visual, *text]
    # The official code goes through a set, whose order follows from the hash table's size.
    return list(set(every)) if order == "official" else every


def least_alike(states: Tensor, candidates: Tensor, visual_pivots: Tensor, order: Sequence[int], wanted: int) -> Tensor:
    """Let each pivot take the candidates least like it, until ``wanted`` are taken.

    Shares differ by one at most, the earlier pivots taking more.

    Args:
        states: ``[n, D]``.
        candidates: ``[V]`` int64 places that may be taken.
        visual_pivots: ``[P]`` int64 places among them that are taken already.
        order: places of the pivots, in the order in which they choose.
        wanted: how many are taken in all.

    Returns:
        ``[wanted]`` int64 places, in the order in which they were taken.

    Example:
        >>> states = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.5, 0.5]])
        >>> least_alike(states, torch.arange(4), torch.tensor([0]), [0], 2).tolist()
        [2, 3]
    """
    free = candidates[~torch.isin(candidates, visual_pivots)]
    wanted = min(wanted, free.numel())
    if wanted == 0:
        return free[:0]
    pivots = torch.tensor(list(order), device=states.device)
    unit = normalised(states)
    alike = unit[pivots] @ unit[free].T
    base, more = divmod(wanted, len(order))
    taken = []
    for row in range(len(order)):
        share = base + (row < more)
        picks = alike[row].sort(stable=True).indices[:share]
        alike[:, picks] = torch.inf
        taken.append(free[picks])
    return torch.cat(taken)
