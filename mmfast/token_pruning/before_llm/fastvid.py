"""FastVID: cut the video into segments, keep what is looked at, and merge the rest into dense spots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmfast.budget import shares
from mmfast.kernels.dpc_knn import dpc_knn
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Merger, VisionSignal, check_choice
from mmfast.token_pruning.similarity import frame_places, highest_first, normalised, sum_by_group
from mmfast.tokens import Keep, VisualTokens

_NEIGHBOURS = 4


@register("fastvid", stage="before_llm", paper="arXiv 2503.11187", source="LunarShen/FastVID", vectors=True)
@dataclass(frozen=True)
class FastVid(Merger):
    """Keep the tokens of each frame that are looked at most, and merge the others segment by segment.

    The video is cut where neighbouring frames are least alike. Each frame keeps its tokens of highest attention. In
    each segment every few frames, counted back from its last, hold anchors: tokens in dense spots that are far from
    denser ones. Each anchor is averaged with the tokens of the segment that it is the most similar anchor of in its
    frame. An image is a single frame.

    The official code cuts off what each frame and anchor frame keeps, so that less is left than asked for, and takes
    anchor frames whose share is that of a single frame for segments of their own (``compat="official"``).

    Paper: "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", NeurIPS 2025.

    Attributes:
        segments: segments a video is cut into at least.
        threshold: neighbouring frames less alike than this, by cosine, are cut apart too.
        context: share of a frame's tokens that goes to anchors.
        stride: frames from one that holds anchors to the next.
        weight: of the anchor in the average, at least.
        frames_by: what frames are compared by: the ``"mean"`` of their tokens, or their ``"class_token"``, where
            the encoder has one.
        compat: ``"official"`` takes over the counts and the anchor frames of the official code.
    """

    needs = frozenset({"cls_attention"})

    keep: int | float | None = 0.25
    segments: int = 8
    threshold: float = 0.9
    context: float = 0.4
    stride: int = 4
    weight: float = 0.6
    frames_by: Literal["mean", "class_token"] = "mean"
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])
        check_choice("frames_by", self.frames_by, ["mean", "class_token"])
        for name in ("segments", "stride"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a count (int >= 1)")
        for name, low in (("threshold", -1.0), ("context", 0.0), ("weight", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= 1.0:
                raise ValueError(f"{name}={value!r} must be a number in [{low:g}, 1]")
        if self.frames_by == "class_token":
            object.__setattr__(self, "needs", self.needs | {"cls_features"})

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the layer whose output the model uses as features."""
        signals = {"cls_attention": VisionSignal("cls_attention")}
        return signals if self.frames_by == "mean" else {**signals, "cls_features": VisionSignal("cls_features")}

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Choose the salient tokens and the anchors, and merge the rest into the anchors."""
        features, attention = tokens.features, tokens.signals["cls_attention"].float()
        frames = [places.to(features.device) for places in frame_places(tokens.layout)]
        sizes = [places.numel() for places in frames]
        budget = self.frame_budget(sizes, kept)
        context = [int(count * self.context) for count in budget]
        order = [places[highest_first(attention[places], places.numel())] for places in frames]
        salient = [own[: count - part] for own, count, part in zip(order, budget, context, strict=True)]
        rest = [own[count - part :].sort().values for own, count, part in zip(order, budget, context, strict=True)]
        goal = torch.full((len(tokens),), -1, dtype=torch.int64, device=features.device)
        found = [torch.cat(salient)]
        goal[found[0]] = found[0]
        values = [features[found[0]]]
        start = 0
        for length in segment_lengths(self.frame_vectors(tokens, frames), self.segments, self.threshold):
            part = slice(start, start + length)
            for anchors, merged in self.merge_segment(features, rest[part], context[part], goal):
                found.append(anchors)
                values.append(merged.to(features.dtype))
            start += length
        places, into = torch.cat(found).sort()
        rank = torch.full_like(goal, -1)
        rank[places] = torch.arange(places.numel(), device=places.device)
        source = torch.where(goal >= 0, rank[goal.clamp_min(0)], goal)
        counts = torch.bincount(source[source >= 0], minlength=places.numel()).float()
        return Keep(places, torch.cat(values)[into], counts, source)

    def frame_budget(self, sizes: Sequence[int], kept: int) -> list[int]:
        """Say how many tokens each frame keeps, its share of the anchors included."""
        if self.compat is None:
            return shares(kept, sizes)
        if isinstance(self.keep, float):
            return [int(size * self.keep) for size in sizes]
        return [min(size, kept // len(sizes)) for size in sizes]

    def frame_vectors(self, tokens: VisualTokens, frames: Sequence[Tensor]) -> Tensor:
        """Return what frames are compared by, ``[T, E]``."""
        if self.frames_by == "class_token" and len(frames) > 1:
            return tokens.signals["cls_features"].float()
        return torch.stack([tokens.features[places].float().mean(dim=0) for places in frames])

    def merge_segment(
        self, features: Tensor, rest: Sequence[Tensor], context: Sequence[int], goal: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Choose the anchors of one segment and merge its tokens into them.

        Args:
            features: ``[N, D]`` of the whole video.
            rest: places of the tokens of each frame that are not salient, ascending.
            context: how many anchors each frame pays for.
            goal: int64 ``[N]``; gets the place of the anchor that each token is most similar to.

        Returns:
            Places of the anchors and their merged features, for each frame that holds anchors.
        """
        if self.compat is None:
            counts = anchor_counts([places.numel() for places in rest], sum(context), self.stride)
        else:
            counts = official_anchor_counts(len(rest), context[0], self.stride)
        whole = torch.cat(list(rest))
        values = features[whole].float()
        unit = normalised(values)
        closest = torch.full_like(whole, -torch.inf, dtype=torch.float32)
        found = []
        bounds = torch.tensor([0, *(places.numel() for places in rest)]).cumsum(0).tolist()
        for index, count in enumerate(counts):
            if count == 0:
                continue
            picks = dpc_knn(features[rest[index]][None], count, neighbours=_NEIGHBOURS).centres[0].sort().values
            alone = self.compat is not None and count == context[0]
            pool = slice(bounds[index], bounds[index + 1]) if alone else slice(0, whole.numel())
            anchors = rest[index][picks]
            similarity, owner = (unit[pool] @ unit[bounds[index] + picks].T).max(dim=1)
            found.append((anchors, absorb(features[anchors], values[pool], owner, self.weight)))
            nearer = similarity > closest[pool]
            goal[whole[pool][nearer]] = anchors[owner[nearer]]
            closest[pool] = torch.maximum(closest[pool], similarity)
        for anchors, _ in found:
            goal[anchors] = anchors
        return found


def segment_lengths(vectors: Tensor, segments: int, threshold: float) -> list[int]:
    """Cut a video between the frames that are least alike.

    Args:
        vectors: ``[T, E]``, one per frame.
        segments: how many segments to make at least; T where there are fewer frames.
        threshold: frames less alike than this are cut apart too.

    Returns:
        Frames of each segment.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> segment_lengths(vectors, 1, 0.5), segment_lengths(vectors, 3, 0.5)
        ([2, 2], [1, 1, 2])
    """
    likeness = cosine_similarity(vectors[:-1].float(), vectors[1:].float(), dim=-1, eps=1e-12)
    cut = likeness < threshold
    cut[highest_first(-likeness, segments - 1)] = True
    ends = [*(cut.nonzero().squeeze(-1) + 1).tolist(), vectors.shape[0]]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def anchor_counts(sizes: Sequence[int], total: int, stride: int) -> list[int]:
    """Split the anchors of a segment evenly over every ``stride``-th frame, counted back from the last.

    Where these have too few tokens, frames are taken at shorter strides.

    Args:
        sizes: tokens each frame has to choose from.
        total: number of anchors; at most as many as there are tokens.
        stride: frames from one that holds anchors to the next.

    Example:
        >>> anchor_counts([9, 9, 9, 9, 9, 9], 7, 4), anchor_counts([4, 4, 4], 8, 4)
        ([0, 4, 0, 0, 0, 3], [4, 0, 4])
    """
    last = len(sizes) - 1
    while sum(sizes[last % stride :: stride]) < total:
        stride -= 1
    holders = [size if (last - index) % stride == 0 else 0 for index, size in enumerate(sizes)]
    counts = [0] * len(sizes)
    while (left := total - sum(counts)) > 0:
        free = [int(size > count) for size, count in zip(holders, counts, strict=True)]
        fair = shares(left, free)
        counts = [min(size, count + more) for size, count, more in zip(holders, counts, fair, strict=True)]
    return counts


def official_anchor_counts(frames: int, context: int, stride: int) -> list[int]:
    """Split the anchors of a segment as the official code does, which cuts off.

    Args:
        frames: frames of the segment.
        context: anchors each frame pays for.
        stride: frames from one that holds anchors to the next.

    Example:
        >>> official_anchor_counts(6, 3, 4)
        [0, 9, 0, 0, 0, 9]
    """
    each = context * frames // -(-frames // stride)
    return [each if (frames - 1 - index) % stride == 0 else 0 for index in range(frames)]


def absorb(anchors: Tensor, tokens: Tensor, owner: Tensor, weight: float) -> Tensor:
    """Average each anchor with the tokens assigned to it.

    Args:
        anchors: ``[A, D]``.
        tokens: ``[n, D]``.
        owner: int64 ``[n]``, the anchor of each token.
        weight: of the anchor, at least; with m tokens it is ``1 / (m + 1)`` where that is more.

    Returns:
        float32 ``[A, D]``.

    Example:
        >>> absorb(torch.tensor([[0.0], [8.0]]), torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]), 0.5).tolist()
        [[1.0], [8.0]]
    """
    members = torch.bincount(owner, minlength=anchors.shape[0])[:, None]
    mean = sum_by_group(tokens, owner, anchors.shape[0]) / members.clamp_min(1)
    # Without members the formula gives the anchor all the weight.
    own = (1.0 / (members + 1)).clamp_min(weight)
    merged: Tensor = own * anchors.float() + (1.0 - own) * mean
    return merged
