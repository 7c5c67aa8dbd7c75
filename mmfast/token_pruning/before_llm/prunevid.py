"""PruneVid, its part before the language model: average what stands still, cluster the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.budget import check_keep, shares
from mmfast.kernels.dpc_knn import dpc_knn
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Merger, check_choice
from mmfast.token_pruning.similarity import (
    frame_places,
    highest_first,
    merged_keep,
    normalised,
    segment_sums,
)
from mmfast.tokens import Keep, VisualTokens

SMALL_SET = 14
"""Sets of up to so many tokens are left as they are where the method itself says how many survive."""


@register("prunevid", stage="before_llm", paper="arXiv 2412.16117", source="Visual-AI/PruneVid", vectors=True)
@dataclass(frozen=True)
class PruneVid(Merger):
    """Average what stands still over a scene, then merge each set of similar tokens into clusters.

    Frames are clustered into scenes. A place whose tokens are alike in all frames of its scene is static: one
    token, the mean, stands for it, at its place in the first frame. The static tokens of a scene, and the others of
    each frame, are then merged around density peaks. With ``keep=None`` the data decide: half of each set of more
    than 14 tokens is left. Another ``keep`` is shared among the sets by their sizes; where averaging alone would
    leave fewer, only the stillest places are averaged. The part inside the language model is ``prunevid_llm``.

    A single image is one frame of one scene. Frames of different sizes are never averaged.

    Paper: "PruneVid: Visual Token Pruning for Efficient Video Large Language Models", ACL 2025 Findings.

    Attributes:
        scenes: number of clusters of frames, as a share of the frames.
        cluster_ratio: what is left of a large set with ``keep=None``.
        threshold: least mean similarity of a static place, in [-1, 1].
        neighbours: how many nearest tokens make up the density of a token.
        frame_neighbours: how many nearest frames make up the density of a frame.
        compat: ``"official"`` hands over the tokens of a scene in the order of the code: static ones, then the
            others frame by frame, the best centre of each first.
    """

    adaptive = True

    keep: int | float | None = None
    scenes: float = 0.25
    cluster_ratio: float = 0.5
    threshold: float = 0.8
    neighbours: int = 7
    frame_neighbours: int = 7
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])
        for name in ("scenes", "cluster_ratio"):
            check_keep(float(getattr(self, name)), field=name)
        check_threshold("threshold", self.threshold)
        for name in ("neighbours", "frame_neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def own_count(self, tokens: VisualTokens) -> int:
        """Add up what is left of each set."""
        return sum(map(self.own_count_of, (len(part) for part in self.sets(tokens, None))))

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Split the tokens into sets, and cluster each."""
        sets = self.sets(tokens, None if self.keep is None else len(tokens) - kept)
        sizes = [len(part) for part in sets]
        own = [self.own_count_of(size) for size in sizes]
        counts = own if self.keep is None and sum(own) == kept else shares(kept, sizes)
        return merge_sets(
            tokens,
            sets,
            counts,
            lambda part, count: average_clusters(part.features, count, self.neighbours),
            raster=self.compat is None,
        )

    def sets(self, tokens: VisualTokens, room: int | None) -> list[TokenSet]:
        """Find scenes, and in each the static places and the other tokens frame by frame.

        Args:
            tokens: one image or video.
            room: at most so many tokens may be saved by averaging; None = any number.
        """
        features = tokens.features
        frames = [places.to(features.device) for places in frame_places(tokens.layout)]
        means = torch.stack([features[places].float().mean(dim=0) for places in frames])
        count = max(1, int(self.scenes * len(frames)))
        windows = same_size(scene_windows(means, count, self.frame_neighbours), frames)
        stillness = [mean_similarity(features, frames[start : end + 1]) for start, end in windows]
        return split_windows(features, frames, windows, self._static(stillness, windows, room))

    def own_count_of(self, size: int) -> int:
        """Say how many of a set of tokens are left with ``keep=None``."""
        return max(1, int(size * self.cluster_ratio)) if size > SMALL_SET else size

    def _static(self, stillness: list[Tensor], windows: list[tuple[int, int]], room: int | None) -> list[Tensor]:
        above = [values > self.threshold for values in stillness]
        if room is None:
            return above
        saved = torch.cat([mask * (end - start) for mask, (start, end) in zip(above, windows, strict=True)])
        order = highest_first(torch.where(torch.cat(above), torch.cat(stillness), -torch.inf), saved.numel())
        fits = torch.cat(above)
        fits[order] &= saved[order].cumsum(dim=0) <= room
        return list(fits.split([len(mask) for mask in above]))


def check_threshold(name: str, value: float) -> None:
    """Refuse what is no cosine.

    Raises:
        ValueError: naming the field, the value and the range.

    Example:
        >>> check_threshold("threshold", 0.8)
    """
    if not -1.0 <= value <= 1.0:
        raise ValueError(f"{name}={value} must be a cosine similarity, in [-1, 1]")


@dataclass(frozen=True)
class TokenSet:
    """Tokens that are merged among themselves.

    Attributes:
        places: int64 ``[w, n]``, the input tokens of each; several frames w where they were averaged.
        features: float32 ``[n, D]``.
    """

    places: Tensor
    features: Tensor

    def __len__(self) -> int:
        return int(self.features.shape[0])


def scene_windows(means: Tensor, clusters: int, neighbours: int) -> list[tuple[int, int]]:
    """Cluster frames and make the clusters contiguous.

    Of each cluster its longest runs of two frames or more stay; the frames between them join the longer of the two
    runs next to them, the earlier one when both are equally long.

    Args:
        means: ``[T, D]`` one vector per frame.
        clusters: number of clusters, at most T.
        neighbours: as of :func:`~mmfast.kernels.dpc_knn.dpc_knn`.

    Returns:
        First and last frame of each window.

    Example:
        >>> scene_windows(torch.tensor([[0.0], [0.1], [0.3], [5.0], [5.1], [5.3]]), 2, 3)
        [(0, 2), (3, 5)]
    """
    return contiguous(dpc_knn(means[None], clusters, neighbours=neighbours).owner[0].tolist())


def contiguous(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Turn labels of frames into windows as :func:`scene_windows` says.

    Example:
        >>> contiguous([2, 3, 2, 2, 0, 0, 2, 0]), contiguous([0, 1, 0])
        ([(0, 3), (4, 7)], [(0, 2)])
    """
    found = _runs(labels)
    longest = {label: max(end - start + 1 for own, start, end in found if own == label) for label in set(labels)}
    refined = list(labels)
    for label, start, end in found:
        if end - start + 1 < longest[label] or longest[label] == 1:
            refined[start : end + 1] = [-1] * (end - start + 1)
    for index in range(len(refined)):
        if refined[index] >= 0:
            continue
        runs = _runs(refined)
        at = next(number for number, (_, start, end) in enumerate(runs) if start <= index <= end)
        beside = [runs[number] for number in (at - 1, at + 1) if 0 <= number < len(runs)]
        label = max(beside, key=lambda run: run[2] - run[1])[0] if beside else 0
        _, start, end = runs[at]
        refined[start : end + 1] = [label] * (end - start + 1)
    return [(start, end) for _, start, end in _runs(refined)]


def _runs(labels: Sequence[int]) -> list[tuple[int, int, int]]:
    """Label, first and last index of each run of equal labels."""
    starts = [index for index in range(len(labels)) if index == 0 or labels[index] != labels[index - 1]]
    ends = [start - 1 for start in starts[1:]] + [len(labels) - 1]
    return [(labels[start], start, end) for start, end in zip(starts, ends, strict=True)]


def same_size(windows: Sequence[tuple[int, int]], frames: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Cut windows where the number of tokens of a frame changes.

    Example:
        >>> same_size([(0, 2)], [torch.arange(2), torch.arange(2), torch.arange(3)])
        [(0, 1), (2, 2)]
    """
    cut = []
    for first, last in windows:
        sizes = [frames[index].numel() for index in range(first, last + 1)]
        cut += [(first + start, first + end) for _, start, end in _runs(sizes)]
    return cut


def mean_similarity(features: Tensor, frames: Sequence[Tensor]) -> Tensor:
    """Average the cosine similarity of each place over all pairs of different frames.

    Args:
        features: ``[N, D]``.
        frames: int64 ``[P]`` places of the tokens of each frame.

    Returns:
        float32 ``[P]``; minus infinity where there is a single frame.

    Example:
        >>> mean_similarity(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.arange(3)[:, None])
        tensor([0.3333])
    """
    count = len(frames)
    if count == 1:
        return torch.full((frames[0].numel(),), -torch.inf, device=features.device)
    total = torch.zeros(frames[0].numel(), features.shape[1], device=features.device)
    own = torch.zeros_like(total[:, 0])
    for places in frames:
        unit = normalised(features[places])
        total += unit
        own += unit.square().sum(dim=-1)
    mean: Tensor = (total.square().sum(dim=-1) - own) / (count * (count - 1))
    return mean


def split_windows(
    features: Tensor, frames: Sequence[Tensor], windows: Sequence[tuple[int, int]], static: Sequence[Tensor]
) -> list[TokenSet]:
    """Make one set of the static places of each window, averaged, and one of the other tokens of each frame.

    Args:
        features: ``[N, D]``.
        frames: int64 places of the tokens of each frame, equally many inside a window.
        windows: first and last frame of each.
        static: bool ``[P]`` per window.

    Returns:
        The sets that are not empty, window by window, the static ones first.

    Example:
        >>> sets = split_windows(torch.eye(4), torch.arange(4).view(2, 2), [(0, 1)], [torch.tensor([True, False])])
        >>> [part.places.tolist() for part in sets], sets[0].features.tolist()
        ([[[0], [2]], [[1]], [[3]]], [[0.5, 0.0, 0.5, 0.0]])
    """
    sets = []
    for (start, end), mask in zip(windows, static, strict=True):
        places = torch.stack(list(frames[start : end + 1]))
        still = places[:, mask]
        mean = torch.zeros(still.shape[1], features.shape[1], device=features.device)
        for frame in still:
            mean += features[frame]
        sets.append(TokenSet(still, mean / len(still)))
        sets += [TokenSet(frame[None], features[frame].float()) for frame in places[:, ~mask]]
    return [part for part in sets if len(part)]


def merge_sets(
    tokens: VisualTokens,
    sets: Sequence[TokenSet],
    counts: Sequence[int],
    reduce: Callable[[TokenSet, int], tuple[Tensor, Tensor, Tensor]],
    *,
    raster: bool = True,
) -> Keep:
    """Reduce each set to its count and put the results together.

    Args:
        tokens: all tokens.
        sets: as of :func:`split_windows`.
        counts: how many tokens of each set are left; at least one in all.
        reduce: gives, for a set and a count below its size, the tokens of the set that stay ``[c]``, their features
            ``[c, D]``, and for each token of the set the one it went into, ``[n]``, -1 where it was dropped.
        raster: as of :func:`~mmfast.token_pruning.similarity.merged_keep`.

    Example:
        >>> parts = [TokenSet(torch.tensor([[1, 2]]), torch.eye(2)), TokenSet(torch.tensor([[0]]), torch.zeros(1, 2))]
        >>> keep = merge_sets(VisualTokens.from_features(torch.zeros(3, 2)), parts, [1, 1], lambda part, count:
        ...                   average_clusters(part.features, count, 7))
        >>> keep.indices.tolist(), keep.features.tolist(), keep.source.tolist()
        ([0, 1], [[0.0, 0.0], [0.5, 0.5]], [0, 1, 1])
    """
    device = tokens.features.device
    slots, features, before = [], [], 0
    source = torch.full((len(tokens),), -1, dtype=torch.int64, device=device)
    for part, count in zip(sets, counts, strict=True):
        if count == 0:
            continue
        whole = torch.arange(len(part), device=device)
        stay, merged, into = (whole, part.features, whole) if count == len(part) else reduce(part, count)
        slots.append(part.places[0, stay])
        features.append(merged.to(tokens.features.dtype))
        source[part.places] = torch.where(into >= 0, into + before, -1)
        before += count
    sizes = torch.bincount(source[source >= 0], minlength=before).float()
    return merged_keep(torch.cat(slots), torch.cat(features), sizes, source, raster=raster)


def average_clusters(features: Tensor, clusters: int, neighbours: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster tokens around density peaks and average each cluster.

    Args:
        features: ``[n, D]``.
        clusters: number of clusters, at most n.
        neighbours: as of :func:`~mmfast.kernels.dpc_knn.dpc_knn`.

    Returns:
        int64 ``[clusters]`` centres, the best first, float32 ``[clusters, D]`` means, and int64 ``[n]`` the cluster
        of each token.

    Example:
        >>> features = torch.tensor([[0.0], [0.2], [0.1], [3.0], [3.1], [3.3]])
        >>> centres, means, owner = average_clusters(features, 2, 3)
        >>> centres.tolist(), [round(mean, 2) for mean in means.flatten().tolist()], owner.tolist()
        ([2, 4], [0.1, 3.13], [0, 0, 0, 1, 1, 1])
    """
    found = dpc_knn(features[None], clusters, neighbours=neighbours)
    centres, owner = found.centres[0], found.owner[0]
    sizes = torch.bincount(owner, minlength=clusters)
    return centres, segment_sums(features, owner, clusters) / sizes[:, None], owner
