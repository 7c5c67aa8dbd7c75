"""EVS: keep what changes from one frame to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mmfast.budget import check_keep, shares, truncated_count
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Selector, check_choice, top_indices
from mmfast.token_pruning.before_llm.uniform import uniform_subset
from mmfast.token_pruning.similarity import frame_places
from mmfast.token_pruning.video import place_similarity, unrounded
from mmfast.tokens import Layout, VisualTokens

FIRST = 255.0
"""Dissimilarity of the tokens of the first frame, which nothing precedes."""


@register("evs", stage="before_llm", paper="arXiv 2510.14624", source="vllm-project/vllm", vectors=True)
@dataclass(frozen=True)
class Evs(Selector):
    """Keep the first frame, and of the others the tokens that differ most from the same place one frame before.

    All frames compete for one budget, so a cut takes much of it and a still scene next to nothing. Where the budget
    is smaller than the first frame, as in an image, evenly spaced tokens are kept of the first frame, as many as
    its share. The official code never keeps fewer tokens than one frame has, cuts the count off instead of rounding
    it, and lets rounding errors decide among tokens that do not change (``compat="official"``).

    Paper: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference".

    Attributes:
        compat: ``"official"`` takes over the counts and the rounding errors of the official code.
    """

    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])

    def keep_count(self, candidates: int) -> int:
        """Say how many of ``candidates`` tokens survive, apart from the official code's least of one frame."""
        check_keep(self.keep)
        if self.compat == "official" and self.keep is not None:
            return truncated_count(self.keep, candidates)
        return super().keep_count(candidates)

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Return the tokens that differ most."""
        frames = frame_places(tokens.layout)
        change = dissimilarity(tokens.features, tokens.layout, frames)
        first = frames[0].to(change.device)
        if kept < first.numel():
            if self.compat == "official":
                return first
            share = shares(kept, [first.numel(), len(tokens) - first.numel()])[0]
            change[first] = -torch.inf
            change[first[uniform_subset(first.numel(), share).to(change.device)]] = FIRST
        if self.compat is None:
            change = 1.0 - unrounded(1.0 - change)
        return top_indices(change, kept)


def dissimilarity(features: Tensor, layout: Layout, frames: Sequence[Tensor]) -> Tensor:
    """Say how much each token differs from the one at the same place of the frame before.

    Args:
        features: ``[N, D]``.
        layout: of the video.
        frames: int64 places of each frame, in order; together all N.

    Returns:
        float32 ``[N]``: one minus the cosine, and 255 in the first frame.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, -1.0]])
        >>> layout = Layout.grid(1, 2, frames=2)
        >>> dissimilarity(features, layout, [torch.tensor([0, 1]), torch.tensor([2, 3])]).tolist()
        [255.0, 255.0, 0.0, 2.0]
    """
    change = torch.full((features.shape[0],), FIRST, device=features.device)
    for before, own in pairwise(frames):
        change[own.to(change.device)] = 1.0 - place_similarity(features, layout, own, before)
    return change
