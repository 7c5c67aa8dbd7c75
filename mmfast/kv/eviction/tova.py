"""TOVA: what the last token looks at stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.kv.base import CacheScorer
from mmfast.kv.entries import Entries
from mmfast.registry import register


@register("tova", stage="cache", paper="arXiv 2401.06104", source="NVIDIA/kvpress", vectors=True)
@dataclass(frozen=True)
class Tova(CacheScorer):
    """Keep the entries that the last token of the prompt attends to, the same in all heads of a layer.

    The entry of the last token always stays. The paper goes on dropping one entry per generated token; here,
    as in the code that the numerics follow, only the prompt is shortened.

    Paper: "Transformers are Multi-State RNNs".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True

    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return the attention of the last row, averaged over all query heads, ``[n]``; the last entry is forced."""
        received = entries.last_rows(1)[:, 0].mean(dim=0)
        return torch.cat([received[:-1], received.new_full((1,), torch.inf)])
