"""Value merging: what is dropped is added to the entry with the most similar key."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import Adjuster
from mmfast.kv.entries import Entries, Retained
from mmfast.registry import register
from mmfast.token_pruning.base import Compat, check_choice

_BLOCK_ELEMENTS = 1 << 22
"""Largest number of float32 cosines held at once (16 MiB)."""

_EPSILON = 1e-6


@register("kv_merging", stage="cache", paper="arXiv 2406.13035", source="NVIDIA/kvpress", vectors=True)
@dataclass(frozen=True)
class KVMerging(Adjuster):
    """Average the value of each dropped entry into the survivor whose key is most similar; keys stay.

    A dropped value weighs the cosine of the two keys times its share of the two norms, the survivor's own value
    weighs 1. Used with a method that drops, such as ``knorm() + kv_merging()``.

    Paper: "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models".
    The weights are those of the source named here.

    Attributes:
        threshold: least cosine of the keys at which a value is merged.
        fraction: share of the dropped entries of a head that may be merged, the most similar first; those below
            ``threshold`` count as the least similar.
        compat: ``"official"`` merges nothing in a head in which more entries than ``1 - fraction`` leaves out are
            below ``threshold`` already, where the official code gets no number for its bound; by default all
            others are merged there.
    """

    merges: ClassVar[bool] = True

    threshold: float = 0.0
    fraction: float = 1.0
    compat: Compat = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("compat", self.compat, [None, "official"])
        if isinstance(self.threshold, bool) or not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r} must be a number from 0 to 1: a cosine")
        if isinstance(self.fraction, bool) or not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction!r} must lie in (0, 1]: a share of the dropped entries")

    def adjust(self, entries: Entries, retained: Retained) -> Retained:
        """Return the same choice with merged values."""
        keys = entries.keys if retained.keys is None else retained.keys
        values = (entries.values if retained.values is None else retained.values).clone()
        for head, kept in enumerate(retained.by_head(entries.heads)):
            if kept.all() or not kept.any():
                continue
            cosine, target = most_similar(entries.keys[head, ~kept], keys[head, kept])
            values[head, kept] = self.merged(cosine, target, entries.values[head, ~kept], values[head, kept])
        return replace(retained, values=values)

    def merged(self, cosine: Tensor, target: Tensor, dropped: Tensor, stays: Tensor) -> Tensor:
        """Merge the values of one head.

        Args:
            cosine: ``[m]`` cosine of each dropped entry with its target.
            target: int64 ``[m]``, which survivor that is.
            dropped: ``[m, d]`` values that go.
            stays: ``[k, d]`` values that stay.

        Returns:
            ``[k, d]`` in the dtype of ``stays``.
        """
        old, new = stays.float(), dropped.float()
        norm = new.norm(dim=-1)
        weight = cosine.clamp_min(0) * norm / (norm + old.norm(dim=-1)[target] + _EPSILON)
        # By filling, not by multiplying: a value that is not finite and does not count must not spoil the others.
        ignored = ~self.similar_enough(cosine) | (cosine <= 0)
        weight = weight.masked_fill(ignored, 0.0)
        sent = (weight[:, None] * new).masked_fill(ignored[:, None], 0.0)
        total = torch.zeros_like(old).index_add(0, target, sent)
        mass = torch.zeros_like(old[:, 0]).index_add(0, target, weight)[:, None]
        return ((old + total) / (1 + mass)).to(stays.dtype)

    def similar_enough(self, cosine: Tensor) -> Tensor:
        """Mark the dropped entries of one head that are merged, bool ``[m]``.

        Example:
            >>> KVMerging(threshold=0.2, fraction=0.5).similar_enough(torch.tensor([0.1, 0.3, 0.5, 0.7])).tolist()
            [False, False, True, True]
        """
        allowed = cosine >= self.threshold
        if self.fraction == 1:
            return allowed
        bound = cosine.masked_fill(~allowed, -torch.inf).quantile(1 - self.fraction)
        if self.compat is None:
            # Between two infinities there is no number to interpolate.
            bound = bound.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        return allowed & (cosine >= bound)


def most_similar(keys: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Find for each key the most similar one among others, the first where several are.

    Args:
        keys: ``[m, d]``.
        others: ``[k, d]``.

    Returns:
        float32 ``[m]`` cosines and int64 ``[m]`` places among ``others``.

    Example:
        >>> most_similar(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        (tensor([1.]), tensor([1]))
    """
    ends = functional.normalize(others.float(), dim=-1, eps=_EPSILON)
    size = max(1, _BLOCK_ELEMENTS // len(others))
    found = []
    for block in keys.split(size):
        cosine = torch.nan_to_num(functional.normalize(block.float(), dim=-1, eps=_EPSILON) @ ends.T, nan=-1.0)
        found.append(cosine.max(dim=-1))
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
