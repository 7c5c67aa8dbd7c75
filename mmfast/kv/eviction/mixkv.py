"""MixKV: attention says what matters, values how much, and keys what there is only once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional

from mmfast.kv.entries import Entries
from mmfast.kv.eviction.snapkv import SnapKV
from mmfast.registry import register
from mmfast.token_pruning.base import check_choice


@register("mixkv", stage="cache", paper="arXiv 2510.20707", source="xuyang-liu16/MixKV", vectors=True)
@dataclass(frozen=True)
class MixKV(SnapKV):
    """Mix the attention of the last tokens with the size of the value and the rarity of the key.

    Sizes and rarities are spread between 0 and 1 in each head and scaled to the mean of the attention. How much
    rarity counts in a head is how alike its keys are: their mean cosine.

    Paper: "Mixing Importance with Diversity: Joint Optimization for KV Cache Compression in Large
    Vision-Language Models".

    Attributes:
        mix: ``"headwise"`` weighs rarity by the redundancy of the head; ``"equal"`` adds up attention, size and
            rarity; ``"value_norm"`` leaves out rarity.
    """

    mix: Literal["headwise", "equal", "value_norm"] = "headwise"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mix", self.mix, ["headwise", "equal", "value_norm"])

    def window_score(self, rows: Tensor, entries: Entries) -> Tensor:
        """Score what stands before the window.

        Args:
            rows: ``[H, w, n]`` attention of the window.
            entries: the entries.

        Returns:
            float32 ``[G, n - w]``.
        """
        attention = super().window_score(rows, entries)
        before = attention.shape[-1]
        matters = attention + matched(entries.values[:, :before].float().norm(dim=-1), attention)
        if self.mix == "value_norm":
            return matters
        similarity, redundancy = key_similarity(entries.keys)
        rarity = matched(-similarity[:, :before], attention)
        if self.mix == "equal":
            return (matters + rarity) / 3
        weight = redundancy[:, None]
        return weight * rarity + (1 - weight) * matters


def key_similarity(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Compare keys with their mean direction.

    Args:
        keys: ``[G, n, d]``, two at least.

    Returns:
        float32 ``[G, n]``, the mean cosine of each key to all; and float32 ``[G]``, the mean cosine of two
        different keys.

    Example:
        >>> import torch
        >>> similarity, redundancy = key_similarity(torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]]))
        >>> [round(value, 3) for value in similarity[0].tolist()], round(redundancy.item(), 3)
        ([0.667, 0.667, 0.333], 0.333)
    """
    unit = functional.normalize(keys.float(), dim=-1)
    mean = unit.mean(dim=1, keepdim=True)
    count = keys.shape[1]
    similarity = (unit @ mean.transpose(1, 2)).squeeze(-1)
    return similarity, (count * mean.square().sum(dim=(1, 2)) - 1) / (count - 1)


def matched(scores: Tensor, model: Tensor) -> Tensor:
    """Spread scores ``[G, n]`` between 0 and 1 in each row, and scale them to the mean of another's row.

    Example:
        >>> import torch
        >>> matched(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[0.5, 0.0, 0.1]])).sum().item() - 0.6 < 1e-6
        True
    """
    low, high = scores.amin(dim=-1, keepdim=True), scores.amax(dim=-1, keepdim=True)
    spread = (scores - low) / (high - low + 1e-8)
    return spread * model.mean(dim=-1, keepdim=True) / spread.mean(dim=-1, keepdim=True).clamp_min(1e-8)
