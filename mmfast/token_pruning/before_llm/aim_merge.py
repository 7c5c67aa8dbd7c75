"""AIM's merging before the language model: average the most similar pairs until few are left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.kernels.bipartite_merge import bipartite_merge
from mmfast.registry import register
from mmfast.token_pruning.base import Merger
from mmfast.token_pruning.similarity import halvings, merged_keep
from mmfast.tokens import Keep, VisualTokens


@register("aim_merge", stage="before_llm", paper="arXiv 2412.03248", source="LaVi-Lab/AIM", vectors=True)
@dataclass(frozen=True)
class AimMerge(Merger):
    """Merge the most similar pairs of tokens, round after round, separately in each frame.

    Each round pairs the tokens at even places with those at odd places and joins the most similar pairs, at
    most half of the tokens. Averages are plain: a token that already stands for several counts as one. The
    paper's second half, which drops inside the language model, is the method ``aim_prune``.

    Paper: "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning", ICCV 2025.
    """

    keep: int | float = 0.25
    scope: Literal["global", "per_tile"] = "per_tile"

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Merge until ``kept`` tokens are left; each stands at the place of the token the others joined."""
        features, slots, source = average_pairs(tokens.features, halvings(len(tokens), kept))
        sizes = torch.bincount(source, minlength=kept).float()
        return merged_keep(slots, features, sizes, source)


def average_pairs(features: Tensor, rounds: Iterable[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Join similar tokens in several rounds, without weighing them by what they stand for.

    Args:
        features: ``[N, D]``.
        rounds: how many tokens each round joins; at most half of those there are.

    Returns:
        ``[K, D]`` features in the dtype of the input, the K tokens they stand at (int64 ``[K]``), and for each
        input token the output it went into (int64 ``[N]``). Order as in the official code.

    Example:
        >>> features = torch.tensor([[2.0, 0.0], [4.0, 0.2], [0.0, 1.0]])
        >>> merged, slots, source = average_pairs(features, [1])
        >>> merged.tolist(), slots.tolist(), source.tolist()
        ([[0.0, 1.0], [3.0, 0.10000000149011612]], [2, 1], [1, 1, 0])
    """
    merged = features.float()
    source = slots = torch.arange(features.shape[0], device=features.device)
    for merges in rounds:
        merged, _, places, joined = (part[0] for part in bipartite_merge(merged[None], merges))
        source, slots = joined[source], slots[places]
    return merged.to(features.dtype), slots, source
