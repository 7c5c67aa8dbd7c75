"""Recycled attention: steps between two full ones read what the last full one looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import Retriever, top_mask
from mmfast.kv.entries import Step
from mmfast.kv.retrieval.quest import by_group, check_count
from mmfast.kv.retrieval.token_select import check_cosine
from mmfast.registry import register


@register("recycled_attention", stage="cache", paper="arXiv 2411.05787")
@dataclass(frozen=True)
class RecycledAttention(Retriever):
    """Read everything every few steps, and in between what the last such step attended to most.

    In between, entries stored since that step and the newest ones are read as well. Entries generated before it
    compete with those of the prompt.

    Paper: "Recycled Attention: Efficient inference for long-context language models" (also published as RefreshKV).

    Attributes:
        keep: entries carried over from a full step, out of all that are stored then.
        stride: steps from one full step to the next.
        recent: newest entries that are always read.
        similarity: read everything when the cosine of the query with that of the last full step falls below this,
            instead of every ``stride`` steps; None for every ``stride`` steps.
    """

    stride: int = 50
    recent: int = 32
    similarity: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("stride", self.stride)
        check_count("recent", self.recent, 0)
        check_cosine("similarity", self.similarity)

    def choose(self, step: Step) -> Tensor | None:
        """Return what is read ``[G, P]``; None in full steps."""
        if step.layer < self.dense_layers:
            return None
        query = step.query[:, 0].float()
        if self._is_full(step, query):
            attention = torch.nan_to_num(by_group(step.probabilities(), step.heads, "mean"))
            step.memory.update(carried=top_mask(attention, self.keep_count(len(step))), query=query)
            return None
        carried = step.memory["carried"]
        mask = functional.pad(carried, (0, len(step) - carried.shape[-1]), value=True)
        mask[:, max(0, len(step) - self.recent) :] = True
        return mask

    def _is_full(self, step: Step, query: Tensor) -> bool:
        carried = step.memory.get("carried")
        if carried is None or carried.shape[-1] > len(step):
            return True
        if self.similarity is None:
            return (step.added - 1) % self.stride == 0
        likeness = functional.cosine_similarity(query.flatten(), step.memory["query"].flatten(), dim=0)
        return not bool(likeness >= self.similarity)
