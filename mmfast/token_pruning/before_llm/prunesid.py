"""PruneSID: one group of tokens per principal direction, and the least redundant tokens of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Selector, VisionSignal
from mmfast.token_pruning.similarity import highest_first, normalised
from mmfast.tokens import VisualTokens


@register("prunesid", stage="before_llm", paper="arXiv 2603.09480", source="ZhengyaoFang/PruneSID")
@dataclass(frozen=True)
class PruneSid(Selector):
    """Group the tokens by principal directions and keep from each group what is not redundant.

    A token belongs to the direction on which it loads most. Inside a group the token the class token
    looks at most suppresses those too similar to it, then the next of those left does, and so on. Each
    group keeps one token; the rest of the budget goes by the number of those not suppressed. The
    official code also hands the class token to the language model and counts it; here it does not.

    Paper: "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic
    Importance-Diversity", ICLR 2026.

    Attributes:
        seed: seed of the randomised decomposition.
    """

    needs = frozenset({"cls_attention", "patch_features"})

    keep: int | float = 64
    scope: Literal["global", "per_tile"] = "per_tile"
    seed: int = 0

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the layer whose output the model uses as features; heads are added up."""
        return {
            "cls_attention": VisionSignal("cls_attention", heads="sum"),
            "patch_features": VisionSignal("patch_features"),
        }

    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Return the survivors group by group."""
        features, attention = tokens.signals["patch_features"], tokens.signals["cls_attention"].float()
        group = principal_groups(features, max(1, kept // 4), self.seed)
        limit = kept / 32 * mean_similarity(features)
        rank, survivors = suppress(features, attention, group, limit)
        sizes = torch.bincount(group, minlength=survivors.numel())
        budget = group_budgets(sizes.tolist(), survivors.tolist(), kept)
        return (rank < torch.tensor(budget, device=rank.device)[group]).nonzero().squeeze(-1)


def principal_groups(features: Tensor, directions: int, seed: int) -> Tensor:
    """Assign each token to the principal direction on which it loads most.

    The tokens are the variables and the channels, squashed by a sigmoid, the observations. The
    decomposition is a randomised one with two power iterations.

    Args:
        features: ``[N, C]``.
        directions: number of directions; no more than N or C can be told apart.
        seed: seed of the random start.

    Returns:
        int64 ``[N]``, ordered so that direction 0 explains most.

    Example:
        >>> features = torch.tensor([[4.0, 0.0, 4.0, 0.0], [4.0, 0.0, 3.0, 0.0], [0.0, 3.0, 3.0, 0.0]])
        >>> principal_groups(features, 2, seed=0).tolist()
        [0, 0, 1]
    """
    values = features.float().sigmoid()
    values = values - values.mean(dim=1, keepdim=True)
    directions = min(directions, *values.shape)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(values.shape[1], directions, generator=generator).to(values.device)
    basis = torch.linalg.qr(values @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(values @ torch.linalg.qr(values.T @ basis).Q).Q
    rotation = torch.linalg.svd(basis.T @ values, full_matrices=False).U
    loadings: Tensor = basis @ rotation
    return loadings.abs().argmax(dim=1)


def mean_similarity(features: Tensor) -> float:
    """Average the cosine similarity over all pairs of different tokens; 0 for a single token.

    Example:
        >>> mean_similarity(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        0.3333333432674408
    """
    unit = normalised(features)
    total = unit.shape[0]
    if total < 2:
        return 0.0
    pairs = unit.sum(dim=0).square().sum() - unit.square().sum()
    return float(pairs / (total * (total - 1)))


def suppress(features: Tensor, attention: Tensor, group: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Rank the tokens of each group: first those not suppressed, then the others, each by attention.

    Args:
        features: ``[N, C]``.
        attention: float32 ``[N]``.
        group: int64 ``[N]``.
        limit: tokens more similar than this to a better survivor of their group are suppressed.

    Returns:
        int64 ``[N]`` rank of each token in its group, and int64 ``[groups]`` number of those not suppressed.
        Ties go to the lower index.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> rank, survivors = suppress(features, torch.tensor([0.5, 0.3, 0.2]), torch.zeros(3, dtype=torch.int64), 0.9)
        >>> rank.tolist(), survivors.tolist()
        ([0, 2, 1], [2])
    """
    unit = normalised(features)
    order = highest_first(attention, attention.numel())
    place = order.argsort()
    total, groups = group.numel(), int(group.max()) + 1
    alive = torch.ones_like(group, dtype=torch.bool)
    survives = torch.zeros_like(alive)
    # All groups go in step: each round takes the best token left of every group.
    while bool(alive.any()):
        best = torch.full((groups,), total, dtype=torch.int64, device=group.device)
        best = best.scatter_reduce(0, group[alive], place[alive], "amin")
        leader = order[best.clamp_max(total - 1)]
        survives[leader[best < total]] = True
        similar = torch.linalg.vecdot(unit, unit[leader[group]]) > limit
        alive &= ~similar & (best[group] != place)
    # Rank inside the group: sort by group, then survivors first, then by attention.
    ranked = ((group * 2 + (~survives).long()) * total + place).argsort()
    sizes = torch.bincount(group, minlength=groups)
    rank = torch.empty_like(group)
    rank[ranked] = torch.arange(total, device=group.device) - (sizes.cumsum(0) - sizes)[group[ranked]]
    return rank, torch.bincount(group[survives], minlength=groups)


def group_budgets(sizes: list[int], survivors: list[int], kept: int) -> list[int]:
    """Split the budget: one for each group, the rest by the number of survivors.

    No group gets more than ``5 * ceil(kept / 64)`` or than it has survivors, unless the budget cannot be spent
    otherwise; what rounding leaves goes to the groups with most survivors.

    Args:
        sizes: tokens of each group.
        survivors: those that are not suppressed.
        kept: the budget, at least the number of groups with tokens and at most all tokens.

    Example:
        >>> group_budgets([6, 4, 0], [5, 2, 0], 5)
        [3, 2, 0]
    """
    caps = [min(5 * -(-kept // 64), alive) for alive in survivors]
    while sum(caps) < kept:
        caps = [min(cap + 1, size) for cap, size in zip(caps, sizes, strict=True)]
    filled = sum(size > 0 for size in sizes)
    rest, whole = kept - filled, sum(survivors)
    budget, before, running = [], 0, 0
    for alive, size, cap in zip(survivors, sizes, caps, strict=True):
        running += alive
        mark = round(running / whole * rest)
        budget.append(min(mark - before + int(size > 0), cap))
        before = mark
    for index in sorted(range(len(sizes)), key=lambda i: (-survivors[i], i)):
        budget[index] += min(caps[index] - budget[index], kept - sum(budget))
    return budget
