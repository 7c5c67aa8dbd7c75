"""Anchor merging: part of the budget by any method that drops, the rest by merging into anchors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmfast.registry import get, register
from mmfast.token_pruning.base import BeforeLLM, Merger, Positions, VisionSignal
from mmfast.token_pruning.similarity import (
    highest_first,
    merged_keep,
    most_similar,
    normalised,
    row_blocks,
    sum_by_group,
)
from mmfast.tokens import Keep, VisualTokens


@register("anchor_merge", stage="before_llm")
@dataclass(frozen=True)
class AnchorMerge(Merger):
    """Let another method keep part of the budget, and merge all other tokens into anchors.

    Anchors are tokens in the middle of many similar ones, away from denser tokens. Every token that is
    neither kept by the other method nor an anchor is averaged into its most similar anchor, which stands at
    the median place of what it averages. Positions stay the original ones, and attention to a merged token is
    raised by how many it stands for, as if they were still there.

    Attributes:
        positions: as in the base, but ``"keep"`` unless said otherwise, which the calibration presumes.
        pruner: name of the other method: any that drops tokens before the language model.
        pruner_options: its options but ``keep``, as pairs of name and value.
        share: share of ``keep`` that the other method gets, in [0, 1); at least one anchor is left.
        calibrate: add the logarithm of the size, times a term of the distance, to the attention logits. None
            does so where the model and the rest of the plan allow it: one-dimensional rotary positions, no
            sliding window, no flash attention, no other method inside the language model.
    """

    keep: int | float = 64
    positions: Positions = "keep"
    pruner: str = "divprune"
    pruner_options: tuple[tuple[str, Any], ...] = ()
    share: float = 0.5
    calibrate: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # Plan files hold lists where a hashable object needs tuples.
        object.__setattr__(self, "pruner_options", _pairs(self.pruner_options))
        if isinstance(self.share, bool) or not 0 <= self.share < 1:
            raise ValueError(f"share={self.share!r} must lie in [0, 1): the share of keep that 'pruner' gets")
        if self.calibrate is not None and not isinstance(self.calibrate, bool):
            raise ValueError(f"calibrate={self.calibrate!r} must be None, True or False")
        inner = self.inner
        object.__setattr__(self, "needs", inner.needs)
        object.__setattr__(self, "reads_question", inner.reads_question)

    @cached_property
    def inner(self) -> BeforeLLM:
        """The other method, with its options.

        Raises:
            ValueError: if it is unknown, merges, acts at another stage, or has no such option.
        """
        info = get(self.pruner)
        if info.stage != "before_llm" or info.merges:
            raise ValueError(f"pruner={self.pruner!r} must name a method that drops tokens before the language model")
        options = dict(self.pruner_options)
        unknown = sorted(set(options) - (set(info.options) - {"keep"}))
        if unknown:
            raise ValueError(
                f"pruner_options={self.pruner_options!r}: {', '.join(map(repr, unknown))} cannot be given; "
                f"options of {self.pruner!r} beside keep: {', '.join(sorted(set(info.options) - {'keep'}))}"
            )
        method: BeforeLLM = info.method(**options)
        return method

    @property
    def wants_clip(self) -> bool:
        """As the other method."""
        return self.inner.wants_clip

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for what the other method reads."""
        return self.inner.vision_signals()

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Choose the tokens that stay alone and the anchors, and merge the others."""
        features = tokens.features
        alone = torch.zeros(len(tokens), dtype=torch.bool, device=features.device)
        by_pruner = min(round(self.share * kept), kept - 1)
        if by_pruner > 0:
            decision = replace(self.inner, keep=by_pruner)(tokens)
            if decision is not None:
                alone[decision.indices] = True
        chosen = alone.nonzero().squeeze(-1)
        anchors = top_anchors(features, ~alone, kept - chosen.numel())
        others = ~alone
        others[anchors] = False
        rest = others.nonzero().squeeze(-1)
        group = most_similar(features[rest], features[anchors])
        sizes = 1 + torch.bincount(group, minlength=anchors.numel())
        sums = features[anchors].float() + sum_by_group(features[rest], group, anchors.numel())
        source = torch.full_like(alone, -1, dtype=torch.int64)
        source[chosen] = torch.arange(chosen.numel(), device=source.device)
        source[anchors] = torch.arange(chosen.numel(), kept, device=source.device)
        source[rest] = group + chosen.numel()
        merged = (sums / sizes[:, None]).to(features.dtype)
        ones = torch.ones(chosen.numel(), device=features.device)
        return merged_keep(
            median_slots(source, kept),
            torch.cat([features[chosen], merged]),
            torch.cat([ones, sizes.float()]),
            source,
        )


def anchor_scores(features: Tensor) -> Tensor:
    """Score tokens by density times distance to denser ones.

    The density ``R_i`` is the sum of cosine similarities to all tokens; the distance is 1 minus the
    similarity to the most similar denser token, and for the densest token to the least similar one of all.
    Of equally dense tokens the earlier one counts as denser.

    Args:
        features: ``[N, D]``.

    Returns:
        float32 ``[N]``.

    Example:
        >>> scores = anchor_scores(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        >>> scores.tolist()
        [2.0, 0.0, 1.0]
    """
    unit = normalised(features)
    density = unit @ unit.sum(dim=0)
    total = density.numel()
    rank = highest_first(density, total).argsort()
    distance = torch.empty_like(density)
    for part in row_blocks(total, total):
        similarity = unit[part] @ unit.T
        denser = rank < rank[part, None]
        nearest = similarity.masked_fill(~denser, -torch.inf).amax(dim=1)
        distance[part] = 1 - torch.where(denser.any(dim=1), nearest, similarity.amin(dim=1))
    return density * distance


def top_anchors(features: Tensor, allowed: Tensor, count: int) -> Tensor:
    """Return the ``count`` allowed tokens of highest anchor score, ascending; ties go to the lower index.

    Args:
        features: ``[N, D]``; all of them decide the scores.
        allowed: bool ``[N]``, at least ``count`` True.
        count: number of anchors.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> top_anchors(features, torch.tensor([False, True, True]), 1).tolist()
        [2]
    """
    score = anchor_scores(features).masked_fill(~allowed, -torch.inf)
    return highest_first(score, count).sort().values


def median_slots(group: Tensor, groups: int) -> Tensor:
    """Return the median member of each group, the lower of two: a slot no other group can claim.

    Args:
        group: int64 ``[N]`` in ``0..groups-1``; no group is empty.
        groups: number of groups.

    Returns:
        int64 ``[groups]``.

    Example:
        >>> median_slots(torch.tensor([1, 0, 1, 1, 0]), 2).tolist()
        [1, 2]
    """
    order = group.sort(stable=True).indices
    sizes = torch.bincount(group, minlength=groups)
    return order[sizes.cumsum(0) - sizes + (sizes - 1) // 2]


def _pairs(value: object) -> tuple[tuple[str, Any], ...]:
    """Check that options are pairs of name and value.

    Raises:
        ValueError: if they are not.
    """
    if isinstance(value, tuple | list):
        pairs = [tuple(entry) for entry in value if isinstance(entry, tuple | list) and len(entry) == 2]
        if len(pairs) == len(value) and all(isinstance(name, str) for name, _ in pairs):
            return tuple((name, setting) for name, setting in pairs)
    raise ValueError(f"pruner_options={value!r} must be pairs of name and value such as (('alpha', 0.5),)")
