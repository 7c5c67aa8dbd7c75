"""HoliTom, its part inside the language model: what is not looked at is merged into what is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import top_indices
from mmfast.token_pruning.in_llm.fastv import last_row_score
from mmfast.token_pruning.layers import DropOnce, LayerDropper, LayerEvent, LayerRequest, LayerTokens
from mmfast.token_pruning.similarity import most_similar, segment_sums
from mmfast.tokens import Keep


@register("holitom_inner", stage="in_llm", paper="arXiv 2505.21334", source="cokeshao/HoliTom", vectors=True)
@dataclass(frozen=True)
class HoliTomInner(DropOnce, LayerDropper):
    """Drop once by the attention of the last prompt token, and average what goes into what resembles it most.

    Dropped tokens are averaged into their survivor one after the other, in the order of the prompt, so that the
    later ones weigh more. The default layer is that of the paper, 18 of 28. The part of HoliTom before the language
    model is ``holitom``.

    Paper: "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025.
    """

    needs = frozenset({"attention"})
    merges = True

    layer: int | float = 18 / 28

    def request(self, event: LayerEvent) -> LayerRequest:
        """Ask for the row of the layer before."""
        return LayerRequest(event.layer - 1, queries="last")

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Keep:
        """Keep the best and merge the others into them."""
        if kept is None:
            raise ValueError(f"method {self.name!r} needs a count; give keep")
        best = top_indices(last_row_score(tokens), kept)
        return Keep(best, merge_in_turn(tokens.hidden[tokens.candidates], best))


def merge_in_turn(states: Tensor, kept: Tensor) -> Tensor:
    """Average each row that is not kept into the kept row most similar to it, one after the other.

    Similarities are those before anything is merged.

    Args:
        states: ``[V, D]``.
        kept: int64 ``[K]``, ascending.

    Returns:
        ``[K, D]`` in the dtype of ``states``; rows of NaN where nothing was merged.

    Example:
        >>> states = torch.tensor([[4.0, 0.0], [2.0, 0.1], [8.0, 0.1], [0.0, 1.0]])
        >>> merge_in_turn(states, torch.tensor([0, 3]))[0].tolist()
        [5.5, 0.07500000298023224]
    """
    left = torch.ones(states.shape[0], dtype=torch.bool, device=states.device)
    left[kept] = False
    dropped = left.nonzero().squeeze(-1)
    target = most_similar(states[dropped], states[kept])
    joined = torch.bincount(target, minlength=kept.numel())
    order = target.sort(stable=True).indices
    # The last of m counts a half, the one before a quarter, and the survivor itself 2 ** -m.
    ahead = torch.empty_like(target)
    ahead[order] = joined.cumsum(0)[target[order]] - torch.arange(target.numel(), device=target.device)
    merged = segment_sums(states[dropped].float() * _halved(ahead)[:, None], target, kept.numel())
    merged += states[kept].float() * _halved(joined)[:, None]
    return torch.where(joined[:, None] > 0, merged, torch.nan).to(states.dtype)


def _halved(times: Tensor) -> Tensor:
    return torch.exp2(-times.float())
