"""CriticalKV: scores that also count what an entry can do to the output of the layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.kv.base import CacheScorer, scorer_named, top_mask
from mmfast.kv.entries import Entries
from mmfast.registry import register

_BLOCK_ELEMENTS = 1 << 22
"""Largest number of float32 outputs held at once (16 MiB)."""


@register("critical_kv", stage="cache", paper="arXiv 2502.03805", source="NVIDIA/kvpress", vectors=True)
@dataclass(frozen=True)
class CriticalKV(CacheScorer):
    """Keep half by the scores of another method, the rest by these times the size of the entry's contribution.

    The contribution of an entry is the sum of the absolute values of its value after the output projection,
    averaged over the query heads that read it. Scores that can be negative are raised so that the lowest is zero:
    a large contribution must never count against an entry. What the other method forces always stays.

    Paper: "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective".

    Attributes:
        scorer: the method that scores, by name or with options such as ``"snapkv(window=16)"``; its ``keep``
            is not used.
        first_stage: share of ``keep`` that is chosen by its scores alone, cut off.
        epsilon: added to the scores before they are multiplied.
    """

    # What the scorers of this library need between them: which one it will be is not known to the class.
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "rotation", "output_projection"})
    reads_question: ClassVar[bool] = True

    scorer: str = "snapkv"
    first_stage: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.first_stage, bool) or not 0 <= self.first_stage <= 1:
            raise ValueError(f"first_stage={self.first_stage!r} must be a number from 0 to 1: a share of keep")
        if isinstance(self.epsilon, bool) or not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon={self.epsilon!r} must be a number of at least 0")
        if self.base.entries == "visual" and self.entries != "visual":
            raise ValueError(f"entries={self.entries!r} must be 'visual' with scorer={self.scorer!r}, which is")
        further = self.base.needs - self.needs
        if further:
            raise ValueError(
                f"scorer={self.scorer!r} needs {', '.join(sorted(further))}; it must be a method that needs no more "
                f"than {', '.join(sorted(self.needs))}"
            )

    @cached_property
    def base(self) -> CacheScorer:
        """The method that scores.

        Raises:
            ValueError: if ``scorer`` names no such method.
        """
        found = scorer_named(self.scorer)
        if isinstance(found, CriticalKV):
            raise ValueError(f"scorer={self.scorer!r} must name another method that scores cached entries")
        return found

    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return scores times contributions, ``[G, n]``; what the first stage chooses is forced."""
        base = torch.nan_to_num(self.base.score(entries, kept).float(), nan=-torch.inf, posinf=torch.inf)
        base = base.expand(entries.heads, -1)
        if self.entries == "visual":
            # Text stays anyway and must not use up the first stage.
            base = base.masked_fill(~entries.visual, -torch.inf)
            kept -= int((~entries.visual).sum())
        forced = top_mask(base, int(self.first_stage * kept)) | (base == torch.inf)
        lowest = base.masked_fill(base.isinf(), 0.0).amin(dim=-1, keepdim=True).clamp_max(0.0)
        weighted = (base - lowest + self.epsilon) * self.contributions(entries)
        return weighted.masked_fill(base == -torch.inf, -torch.inf).masked_fill(forced, torch.inf)

    def contributions(self, entries: Entries) -> Tensor:
        """Return the mean absolute sum of each value after the output projection, float32 ``[G, n]``."""
        if entries.output_weight is None:
            raise RuntimeError('a method that reads the output projection must name "output_projection" in needs')
        width = entries.values.shape[-1]
        # [H, d, D]: how each query head writes into the output.
        weight: Tensor = entries.output_weight.float().T.unflatten(0, (-1, width))
        group = weight.shape[0] // entries.heads
        size = max(1, _BLOCK_ELEMENTS // weight.shape[-1])
        total = torch.zeros(entries.heads, len(entries), device=entries.values.device)
        for head, own in enumerate(weight):
            for start in range(0, len(entries), size):
                block = entries.values[head // group, start : start + size].float() @ own
                total[head // group, start : start + size] += block.abs().sum(dim=-1)
        return total / group
