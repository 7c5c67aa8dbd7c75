"""PruMerge: keep the outliers of the class token's attention and merge their neighbours into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.token_pruning.base import Compat, Merger, VisionSignal, check_choice
from mmfast.token_pruning.similarity import Cosines, highest_first, merged_keep, outlier_share, row_blocks
from mmfast.tokens import Keep, VisualTokens


@register("prumerge", stage="before_llm", paper="arXiv 2403.15388", source="42Shawn/LLaVA-PruMerge", vectors=True)
@dataclass(frozen=True)
class PruMerge(Merger):
    """Keep the tokens the class token looks at, add their neighbours to them, and sum up the rest.

    Each kept token takes over the tokens with the most similar keys, kept or not, weighted with the class
    token's attention to them. All dropped tokens make up one more token, their sum weighted in the same
    way; it counts in ``keep`` and takes the place of the dropped token of highest attention. The paper
    speaks of weighted averages; the code, followed here, does not normalise the weights.

    Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025.

    Attributes:
        keep: what survives; None counts the outliers among the attention of the image, above the upper
            quartile by more than 1.5 interquartile ranges.
        neighbours: how many tokens a kept token takes over; all others where there are fewer.
        compat: ``"official"`` hands the tokens on in the official order, by falling attention and the sum
            of the dropped ones last.
    """

    needs = frozenset({"cls_attention", "keys", "patch_features"})
    adaptive: ClassVar[bool] = True

    keep: int | float | None = None
    neighbours: int = 32
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int) or self.neighbours < 0:
            raise ValueError(f"neighbours={self.neighbours!r} must be a count (int >= 0)")
        if self.keep is None and self.scope == "per_tile":
            raise ValueError(
                "keep=None counts the outliers of the whole image and cannot be split by tile; use scope='global' or "
                "give keep"
            )

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Ask for the last block, whose projections count as one head of full width, and for the features."""
        return {
            "cls_attention": VisionSignal("cls_attention", "last", "join"),
            "keys": VisionSignal("keys", "last", "join"),
            "patch_features": VisionSignal("patch_features"),
        }

    def own_count(self, tokens: VisualTokens) -> int:
        """Count the outliers; the sum of all others is one token more."""
        return self.outliers(tokens.signals["cls_attention"]).numel() + 1

    def outliers(self, attention: Tensor) -> Tensor:
        """Choose by the rule of ``keep=None``, at least one token."""
        return highest_first(attention, max(1, outlier_count(attention)))

    def choose(self, attention: Tensor, count: int) -> Tensor:
        """Choose ``count`` tokens."""
        return highest_first(attention, count)

    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Choose the tokens and merge the others into them."""
        features, space = self.material(tokens)
        attention = tokens.signals["cls_attention"].float()
        # With a single token there is no room for the sum of the others.
        picks = self.outliers(attention) if self.keep is None else self.choose(attention, max(1, kept - 1))
        merged = add_neighbours(features, tokens.signals["keys"], attention, picks, self.neighbours)
        source = torch.full_like(attention, -1, dtype=torch.int64)
        source[picks] = torch.arange(picks.numel(), device=picks.device)
        sizes = torch.ones(kept, device=picks.device)
        if kept > picks.numel():
            dropped = source < 0
            source[dropped] = picks.numel()
            sizes[-1] = dropped.sum()
            heaviest = attention.masked_fill(~dropped, -torch.inf).argmax()
            merged = torch.cat([merged, sum_of_dropped(features, attention, picks)[None]])
            picks = torch.cat([picks, heaviest[None]])
        return merged_keep(picks, merged, sizes, source, space, raster=self.compat is None)


def outlier_count(attention: Tensor) -> int:
    """Count the outliers of one image's attention, cut off as the official code does.

    Example:
        >>> outlier_count(torch.tensor([0.1, 0.1, 0.12, 0.11, 0.9]))
        1
    """
    return int(attention.numel() * outlier_share(attention))


def add_neighbours(features: Tensor, keys: Tensor, attention: Tensor, picks: Tensor, neighbours: int = 32) -> Tensor:
    """Add to each picked token its neighbours by similarity of keys, weighted with their attention.

    Args:
        features: ``[N, C]``.
        keys: ``[N, d]``.
        attention: float32 ``[N]``.
        picks: int64 ``[K]``.
        neighbours: how many of the other tokens count.

    Returns:
        ``[K, C]`` in the dtype of ``features``, in the order of ``picks``.

    Example:
        >>> features = torch.tensor([[1.0], [10.0], [100.0]])
        >>> keys = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> add_neighbours(features, keys, torch.tensor([0.5, 0.2, 0.1]), torch.tensor([0]), 1).tolist()
        [[3.0]]
    """
    cosines, values = Cosines(keys), features.float()
    total = values.shape[0]
    merged = []
    for part in row_blocks(picks.numel(), total):
        rows = picks[part]
        similarity = cosines.between(rows).clone()
        similarity[torch.arange(rows.numel(), device=rows.device), rows] = -torch.inf
        nearest = similarity.sort(dim=1, descending=True, stable=True).indices[:, : min(neighbours, total - 1)]
        weights = torch.zeros_like(similarity).scatter_(1, nearest, attention[nearest])
        merged.append(values[rows] + weights @ values)
    return (torch.cat(merged) if merged else values[:0]).to(features.dtype)


def sum_of_dropped(features: Tensor, attention: Tensor, picks: Tensor) -> Tensor:
    """Add up the tokens that were not picked, weighted with their attention.

    Args:
        features: ``[N, C]``.
        attention: float32 ``[N]``.
        picks: int64 ``[K]``.

    Returns:
        ``[C]`` in the dtype of ``features``.

    Example:
        >>> features, attention = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0.5, 0.5, 0.25])
        >>> sum_of_dropped(features, attention, torch.tensor([0])).tolist()
        [2.0]
    """
    weights = attention.clone()
    weights[picks] = 0
    return (weights @ features.float()).to(features.dtype)
