"""TokenSelect: heads vote for single entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import top_mask
from mmfast.kv.entries import Step
from mmfast.kv.eviction.snapkv import check_kernel, pooled
from mmfast.kv.retrieval.quest import PromptReader, check_count
from mmfast.registry import register


@register("token_select", stage="cache", paper="arXiv 2411.02886", source="pzs19/TokenSelect", vectors=True)
@dataclass(frozen=True)
class TokenSelect(PromptReader):
    """Read the entries that the heads vote for, each with its attention.

    All heads read the same entries: the start of the prompt, the newest entries, and between them those with the
    largest attention (over what is between them, logits not scaled) added up over the heads. A query much like the
    one of the last vote takes over its result. Positions stay what they were; the official code renumbers what
    is read, for prompts beyond the trained length.

    Paper: "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic
    Token-Level KV Cache Selection".

    Attributes:
        keep: entries of the prompt to read, both ends included.
        first: entries at the start that are always read.
        local: newest entries that are always read, those after the prompt included. Where both ends leave no
            room between them, they share half of it.
        kernel: width of a max-pooling of the votes, odd; None for none.
        reuse: cosine of two queries from which on the vote is taken over; None for never.
    """

    first: int = 128
    local: int = 512
    kernel: int | None = None
    reuse: float | None = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("first", self.first, 0)
        check_count("local", self.local, 0)
        if self.kernel is not None:
            check_kernel(self.kernel)
        check_cosine("reuse", self.reuse)

    def read(self, step: Step, total: int, kept: int) -> Tensor:
        """Return one choice for all heads, ``[total]``."""
        first, local = fitting_ends(self.first, self.local, kept)
        local = max(0, local - step.added)
        mask = self._voted(step, slice(first, total - local), kept - first - local, total)
        mask[:first] = True
        mask[total - local :] = True
        return mask

    def _voted(self, step: Step, between: slice, count: int, total: int) -> Tensor:
        query, last = step.query[:, 0].float(), step.memory.get("voter")
        if self.reuse is not None and last is not None and step.memory["voted"].shape[-1] == total:
            likeness = functional.cosine_similarity(query.flatten(), last.flatten(), dim=0)
            if bool(likeness >= self.reuse):
                return step.memory["voted"].clone()
        real = None if step.real is None else step.real[:, between]
        votes = count_votes(query, step.keys[:, between], self.kernel, real)
        mask = votes.new_zeros(total, dtype=torch.bool)
        mask[between] = top_mask(votes, count)
        if self.reuse is not None:
            step.memory.update(voter=query, voted=mask.clone())
        return mask


def count_votes(query: Tensor, keys: Tensor, kernel: int | None = None, real: Tensor | None = None) -> Tensor:
    """Add up the attention of all heads.

    Args:
        query: ``[H, d]``; the mean over the queries where there are several.
        keys: ``[G, n, d]``.
        kernel: width of the max-pooling; None for none.
        real: bool ``[G, n]``, entries that exist; None = all.

    Returns:
        float32 ``[n]``.

    Example:
        >>> count_votes(torch.zeros(2, 4), torch.ones(1, 2, 4)).tolist()
        [1.0, 1.0]
    """
    grouped = rearrange(query.float(), "(g r) d -> g r d", g=keys.shape[0])
    logits = grouped @ keys.float().mT
    if real is not None:
        logits = logits.masked_fill(~real[:, None], -torch.inf)
    votes = torch.nan_to_num(logits.softmax(dim=-1)).sum(dim=(0, 1))
    return votes if kernel is None else pooled(votes[None], kernel, "max")[0]


def fitting_ends(first: int, last: int, kept: int) -> tuple[int, int]:
    """Let two ends of the prompt share half of the budget where they would leave nothing between them.

    Example:
        >>> fitting_ends(4, 16, 40), fitting_ends(128, 512, 100), fitting_ends(32, 32, 1)
        ((4, 16), (10, 40), (0, 0))
    """
    return (first, last) if first + last < kept else shrunken(first, last, kept // 2)


def shrunken(first: int, last: int, limit: int) -> tuple[int, int]:
    """Shrink two counts in proportion until they add up to at most ``limit``; of the first, one stays if it can.

    Example:
        >>> shrunken(128, 512, 50), shrunken(2, 3, 9), shrunken(128, 512, 1)
        ((10, 40), (2, 3), (1, 0))
    """
    if first + last <= limit:
        return first, last
    smaller = min(limit, max(min(1, first), limit * first // (first + last)))
    return smaller, limit - smaller


def check_cosine(field: str, value: object) -> None:
    """Refuse what is neither None nor a cosine.

    Raises:
        ValueError: naming the field and the value.

    Example:
        >>> check_cosine("reuse", 2.0)
        Traceback (most recent call last):
        ValueError: reuse=2.0 must be a number in [-1, 1], or None
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1):
        raise ValueError(f"{field}={value!r} must be a number in [-1, 1], or None")
