"""Squeezed Attention: clusters of keys, read where their centre is worth it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.quest import PromptReader, by_group, check_count, means_by_label
from mmfast.registry import register
from mmfast.token_pruning.attention import AttentionView


@register(
    "squeezed_attention", stage="cache", paper="arXiv 2411.09688", source="SqueezeAILab/SqueezedAttention", vectors=True
)
@dataclass(frozen=True)
class SqueezedAttention(PromptReader):
    """Read the clusters of keys whose centre would be attended to more than a threshold.

    The keys of each head are clustered by direction. What a key of a cluster would be given, were all keys in the
    place of their centre, is compared with one threshold for all heads of a layer: the quantile, over heads and
    keys, of what the last tokens of the prompt would give on average. The last tokens themselves are in no cluster
    and always read. The official code has one threshold for all layers, which would have to see all of them before
    the first step.

    ``keep`` is what a step with the average of those scores would read. Heads and steps differ from that: a query
    that likes few clusters reads less, one that likes many reads more.

    Paper: "Squeezed Attention: Accelerating Long Context Length LLM Inference", ACL 2025.

    Attributes:
        keep: entries of the prompt that the threshold is set for, the observation window included.
        clusters: number of clusters, as a fraction of the clustered entries; more where four of them would not fit
            into ``keep``.
        observation: last tokens of the prompt, by which the threshold is found; at most half of ``keep``.
        iterations: rounds of the clustering.
        seed: seed of its start.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    ragged: ClassVar[bool] = True

    clusters: float = 0.05
    observation: int = 100
    iterations: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.clusters, bool) or not 0.0 < self.clusters <= 1.0:
            raise ValueError(f"clusters={self.clusters!r} must be a fraction in (0, 1]")
        check_count("observation", self.observation)
        check_count("iterations", self.iterations)
        check_count("seed", self.seed, 0)

    def study(self, entries: Entries, kept: int) -> None:
        """Remember clusters ``[G, m]``, their centres ``[G, K, d]``, their sizes ``[G, K]`` and the threshold."""
        window = max(1, min(self.observation, kept // 2))
        before = len(entries) - window
        keys = entries.keys[:, :before]
        # Where little is read, clusters must be small enough for a few of them to fit.
        count = max(int(self.clusters * before), min(before, -(-4 * before // max(1, kept - window))))
        labels = cluster(keys, count, self.iterations, self.seed)
        count = int(labels.max()) + 1
        centres, sizes = means_by_label(keys, labels, count)
        rows = torch.arange(before, len(entries), device=keys.device)
        view = entries.view
        looked = AttentionView(view.query, centres, scaling=view.scaling, softcap=view.softcap)
        given = cluster_scores(looked.logits(rows, masked=False), sizes).mean(dim=1)
        each = by_group(given, entries.heads, "mean").gather(-1, labels)
        threshold = quantile(each, 1.0 - (kept - window) / before)
        entries.memory.update(labels=labels, centres=centres, sizes=sizes, threshold=threshold)

    def read(self, step: Step, total: int, kept: int) -> Tensor | None:
        """Return the members of the clusters above the threshold and all of the window, ``[G, total]``."""
        labels, centres = step.memory["labels"], step.memory["centres"]
        window = max(1, min(self.observation, kept // 2))
        if labels.shape[-1] != total - window:
            return None
        view = AttentionView(step.query, centres, scaling=step.scaling, softcap=step.softcap)
        logits = view.logits(torch.zeros(1, dtype=torch.int64, device=centres.device), masked=False)
        scores = by_group(cluster_scores(logits, step.memory["sizes"])[:, 0], step.heads, "mean")
        return functional.pad(members_above(scores, labels, step.memory["threshold"]), (0, window), value=True)


def cluster(keys: Tensor, count: int, iterations: int, seed: int) -> Tensor:
    """Cluster the keys of each head by direction, with k-means.

    Args:
        keys: ``[G, n, d]``.
        count: number of clusters; some may end up empty.
        iterations: at most so many rounds; fewer where nothing changes any more.
        seed: draws the keys that the clusters start from, without repetition.

    Returns:
        int64 ``[G, n]``, the cluster of each key.

    Example:
        >>> labels = cluster(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 0.1]]]), 2, iterations=5, seed=0)[0]
        >>> bool(labels[0] == labels[2]), bool(labels[0] == labels[1])
        (True, False)
    """
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nan_to_num(functional.normalize(keys.float(), dim=-1))
    found = []
    for points in unit:
        centres = points[torch.randperm(len(points), generator=generator)[:count].to(points.device)]
        labels = _nearest(points, centres)
        for _ in range(iterations):
            moved, sizes = means_by_label(points[None], labels[None], len(centres))
            # A cluster that nothing is closest to stays where it is.
            centres = torch.where(sizes[0, :, None] > 0, moved[0], centres)
            former, labels = labels, _nearest(points, centres)
            if torch.equal(former, labels):
                break
        found.append(labels)
    return torch.stack(found)


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    # The squared length of the point itself is the same for all centres.
    return (points @ centres.T - centres.square().sum(dim=-1) / 2).argmax(dim=-1)


def cluster_scores(logits: Tensor, sizes: Tensor) -> Tensor:
    """Say what each key of a cluster would be given, were all keys in the place of their centre.

    Args:
        logits: ``[H, R, K]``, scaled logits of queries over centres.
        sizes: ``[G, K]``, number of keys of each cluster.

    Returns:
        float32 ``[H, R, K]``; members of all clusters together get one.

    Example:
        >>> cluster_scores(torch.zeros(1, 1, 2), torch.tensor([[1.0, 3.0]])).tolist()
        [[[0.25, 0.25]]]
    """
    members = sizes.repeat_interleave(logits.shape[0] // sizes.shape[0], dim=0)[:, None]
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    return torch.nan_to_num(weights / (weights * members).sum(dim=-1, keepdim=True))


def quantile(values: Tensor, level: float) -> Tensor:
    """Return a quantile of all values, between two of them in proportion; for any number of values.

    Args:
        values: any shape.
        level: between 0 and 1.

    Returns:
        float32, a single number.

    Example:
        >>> quantile(torch.tensor([4.0, 1.0, 2.0]), 0.75).item()
        3.0
    """
    ordered = values.flatten().float().sort().values
    place = min(max(level, 0.0), 1.0) * (ordered.numel() - 1)
    below = math.floor(place)
    above = min(below + 1, ordered.numel() - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)


def members_above(scores: Tensor, labels: Tensor, threshold: Tensor | float) -> Tensor:
    """Mark the members of the clusters that reach a threshold.

    Args:
        scores: ``[..., K]``.
        labels: int64 ``[..., n]``.
        threshold: a single number.

    Returns:
        bool ``[..., n]``.

    Example:
        >>> members_above(torch.tensor([0.1, 0.3]), torch.tensor([1, 0, 1]), 0.2).tolist()
        [True, False, True]
    """
    return (scores >= threshold).gather(-1, labels)
