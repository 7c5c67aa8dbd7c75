"""HoliTom, its part before the language model: windows of standing pictures, chosen to save the most tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mmfast.budget import shares
from mmfast.kernels.dpc_knn import dpc_knn
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Merger, VisionSignal, check_choice, top_indices
from mmfast.token_pruning.before_llm.prunevid import (
    TokenSet,
    check_threshold,
    merge_sets,
    same_size,
    split_windows,
)
from mmfast.token_pruning.similarity import (
    frame_places,
    normalised,
    segment_sums,
)
from mmfast.tokens import Keep, VisualTokens


@register("holitom", stage="before_llm", paper="arXiv 2505.21334", source="cokeshao/HoliTom", vectors=True)
@dataclass(frozen=True)
class HoliTom(Merger):
    """Average what stands still in the windows that save most tokens; keep what is looked at of the rest.

    Windows of frames are chosen by dynamic programming so that averaging the places that stand still in a window
    saves as many tokens as possible. The budget is shared among the static tokens of each window, which are merged
    around density peaks, and the other tokens of each frame, of which those that the vision encoder's last used
    layer looks at most are kept. Where averaging alone would leave fewer than ``keep``, a stricter threshold is
    taken. Static tokens stand at their place in the first frame of the window. The part inside the language model
    is ``holitom_inner``.

    A single image is one frame, and a plain choice by attention. Frames of different sizes are never averaged.
    The published thresholds are 0.8 down to 15 % and 0.65 for 10 %.

    Paper: "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025.

    Attributes:
        threshold: similarity of consecutive frames above which a place stands still, in [-1, 1].
        weight: what a centre contributes to its cluster, in [0, 1]; the mean of the others makes up the rest.
        neighbours: how many nearest tokens make up the density of a token.
        compat: ``"official"`` rounds the count of each set as the code does, so that the number left is only about
            ``keep``, and hands over static tokens before all others of their window.
    """

    needs = frozenset({"received_attention"})

    keep: int | float = 0.25
    threshold: float = 0.8
    weight: float = 0.6
    neighbours: int = 7
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])
        check_threshold("threshold", self.threshold)
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"weight={self.weight} must lie in [0, 1]")
        if self.neighbours < 1:
            raise ValueError(f"neighbours={self.neighbours} must be at least 1")

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the attention of the layer whose output the model uses."""
        return {"received_attention": VisionSignal("received_attention")}

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Choose windows, share the budget, and reduce each set."""
        features, attention = tokens.features, tokens.signals["received_attention"]
        frames = [places.to(features.device) for places in frame_places(tokens.layout)]
        similarity = [frame_similarity(features, *pair) for pair in itertools.pairwise(frames)]
        windows, static = self.windows(similarity, frames, len(tokens) if self.compat else kept)
        sets = split_windows(features, frames, windows, static)
        share = self.keep if isinstance(self.keep, float) else kept / len(tokens)
        counts = self.counts(sets, share) if self.compat else shares(kept, [len(part) for part in sets])

        def reduce(part: TokenSet, count: int) -> tuple[Tensor, Tensor, Tensor]:
            if len(part.places) > 1:
                return blend_clusters(part.features, count, min(self.neighbours, count), self.weight)
            best = top_indices(attention[part.places[0]], count)
            into = torch.full_like(part.places[0], -1)
            into[best] = torch.arange(count, device=into.device)
            return best, part.features[best], into

        return merge_sets(tokens, sets, counts, reduce, raster=self.compat is None)

    def windows(
        self, similarity: Sequence[Tensor], frames: Sequence[Tensor], kept: int
    ) -> tuple[list[tuple[int, int]], list[Tensor]]:
        """Choose windows so that at least ``kept`` tokens are left (any number with ``compat="official"``).

        Args:
            similarity: float32 ``[P]`` per pair of consecutive frames.
            frames: int64 places of the tokens of each frame.
            kept: how many tokens are to be left at least.

        Returns:
            First and last frame of each window, and bool ``[P]`` per window, the places that stand still.
        """
        total = sum(places.numel() for places in frames)
        windows, saved = best_windows([values > self.threshold for values in similarity], frames)
        low, high = self.threshold, 1.0 + 1e-6
        threshold = low
        if self.compat is None and total - saved < kept:
            for _ in range(24):
                threshold = (low + high) / 2
                enough = total - best_windows([v > threshold for v in similarity], frames)[1] >= kept
                low, high = (low, threshold) if enough else (threshold, high)
            threshold = high
            windows, _ = best_windows([values > threshold for values in similarity], frames)
        static = []
        for start, end in windows:
            mask = torch.full_like(frames[start], start < end, dtype=torch.bool)
            for values in similarity[start:end]:
                mask &= values > threshold
            static.append(mask)
        return windows, static

    def counts(self, sets: Sequence[TokenSet], share: float) -> list[int]:
        """Round the count of each set as the official code does, up for those of single frames."""
        total = sum(part.places.numel() for part in sets)
        rate = min(share / (sum(len(part) for part in sets) / total), 1.0)
        return [round(len(part) * rate) if len(part.places) > 1 else math.ceil(len(part) * rate) for part in sets]


def frame_similarity(features: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Compare two frames place by place; frames of different sizes are not alike anywhere.

    Returns:
        float32 ``[P]`` cosine similarities, for the places of the earlier frame.

    Example:
        >>> frame_similarity(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([0]), torch.tensor([1]))
        tensor([1.])
    """
    if before.numel() != after.numel():
        return torch.full((before.numel(),), -torch.inf, device=features.device)
    similarity: Tensor = (normalised(features[before]) * normalised(features[after])).sum(dim=-1)
    return similarity


def best_windows(still: Sequence[Tensor], frames: Sequence[Tensor]) -> tuple[list[tuple[int, int]], int]:
    """Partition frames so that averaging the places that stand still in each window saves the most tokens.

    Args:
        still: bool ``[P]`` per pair of consecutive frames.
        frames: the tokens of each frame.

    Returns:
        First and last frame of each window, and the number of tokens saved. Of partitions that save equally
        many, the later windows are the shorter ones.

    Example:
        >>> still = [torch.tensor([True, True]), torch.tensor([False, True]), torch.tensor([False, False])]
        >>> best_windows(still, [torch.arange(2)] * 4)
        ([(0, 1), (2, 2), (3, 3)], 2)
    """
    saved, starts = [0], []
    lengths = torch.zeros(frames[0].numel(), dtype=torch.int64)
    for end in range(len(frames)):
        best, begin = saved[end], end
        if end:
            now = still[end - 1].cpu()
            lengths = torch.where(now, lengths + 1, 0) if now.numel() == lengths.numel() else now.long()
            # How many places have stood still over the last n steps, for n = 1, 2, ... end.
            held = one_hot(lengths.clamp_max(end), end + 1).sum(dim=0).flip(0).cumsum(0).flip(0)[1:].tolist()
            for steps, count in enumerate(held, start=1):
                if saved[end - steps] + count * steps > best:
                    best, begin = saved[end - steps] + count * steps, end - steps
        saved.append(best)
        starts.append(begin)
    windows: list[tuple[int, int]] = []
    end = len(frames) - 1
    while end >= 0:
        windows.insert(0, (starts[end], end))
        end = starts[end] - 1
    return same_size(windows, frames), saved[-1]


def blend_clusters(features: Tensor, clusters: int, neighbours: int, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster tokens around density peaks; a centre and the mean of those that join it are blended.

    Args:
        features: ``[n, D]``.
        clusters: number of clusters, at most n.
        neighbours: as of :func:`~mmfast.kernels.dpc_knn.dpc_knn`.
        weight: share of the centre, in [0, 1].

    Returns:
        int64 ``[clusters]`` centres, ascending, float32 ``[clusters, D]`` features, and int64 ``[n]`` the cluster of
        each token.

    Example:
        >>> centres, blended, owner = blend_clusters(torch.tensor([[0.0], [0.2], [0.1]]), 1, 3, 0.5)
        >>> centres.tolist(), [round(value, 4) for value in blended.flatten().tolist()], owner.tolist()
        ([2], [0.1], [0, 0, 0])
    """
    found = dpc_knn(features[None], clusters, neighbours=neighbours)
    centres, order = found.centres[0].sort()
    owner = order.argsort()[found.owner[0]]
    joined = (torch.bincount(owner, minlength=clusters) - 1)[:, None]
    own = features[centres].float()
    others = (segment_sums(features, owner, clusters) - own) / joined.clamp_min(1)
    return centres, torch.where(joined > 0, weight * own + (1 - weight) * others, own), owner
