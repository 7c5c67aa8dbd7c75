"""SentenceKV: sentences found again by what is being written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.kv.base import top_mask
from mmfast.kv.entries import Entries, Step
from mmfast.kv.eviction.snapkv import check_kernel, check_window, fitting_window, forced_window, pooled
from mmfast.kv.retrieval.quest import PromptReader, by_group, check_count, means_by_label
from mmfast.kv.retrieval.token_select import fitting_ends
from mmfast.registry import register


@register("sentence_kv", stage="cache", paper="arXiv 2504.00970", source="zzbright1998/SentenceKV", vectors=True)
@dataclass(frozen=True)
class SentenceKV(PromptReader):
    """Read the sentences of the prompt that are closest to the sentence being written.

    The end of the prompt says which entries may be read at all, a few times as many as a step reads. A sentence is
    ranked by the product of the mean of its keys with the mean query of the sentence being written, and gives its
    entries, earliest first, until the budget is used up. The first tokens of a new sentence read everything.

    A frame of a video is a sentence, and so is a row of an image (of as many rows as columns). What text says is not
    seen here, so that text is cut every ``sentence`` tokens, in the prompt and in what is written.

    Paper: "SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching", COLM 2025.

    Attributes:
        keep: entries of the prompt that each head reads, both ends included.
        first: entries at the start that are always read.
        local: newest entries that are always read, those after the prompt included. Where both ends leave no
            room between them, they share half of it.
        semantic_factor: entries that may be read at all, as a multiple of those that are.
        sentence: tokens of a sentence of text.
        length_threshold: tokens at the start of a sentence that read everything.
        window: last tokens of the prompt, whose attention says what may be read.
        kernel: width of the max-pooling of that attention, odd.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True

    first: int = 32
    local: int = 32
    semantic_factor: float = 5.0
    sentence: int = 32
    length_threshold: int = 1
    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("first", self.first, 0)
        check_count("local", self.local, 0)
        if isinstance(self.semantic_factor, bool) or not self.semantic_factor >= 1:
            raise ValueError(f"semantic_factor={self.semantic_factor!r} must be a number of at least 1")
        check_count("sentence", self.sentence)
        check_count("length_threshold", self.length_threshold, 0)
        check_window(self.window)
        check_kernel(self.kernel)

    def study(self, entries: Entries, kept: int) -> None:
        """Remember what may be read ``[G, n]``, the sentences ``[n]`` and the means of their keys ``[G, S, d]``."""
        able = self.able(entries, kept)
        sentence = split_into_sentences(entries, self.sentence)
        means, _ = means_by_label(entries.keys, sentence.expand_as(able), int(sentence[-1]) + 1, able)
        entries.memory.update(able=able, sentence=sentence, means=means)

    def able(self, entries: Entries, kept: int) -> Tensor:
        """Mark the entries of each head that may be read, ``[G, n]``."""
        total = len(entries)
        count = min(total, int(self.semantic_factor * kept))
        if count == total:
            return torch.ones(entries.heads, total, dtype=torch.bool, device=entries.keys.device)
        window = fitting_window(self.window, count, total)
        received = entries.last_rows(window)[..., : total - window].sum(dim=1)
        scores = forced_window(pooled(entries.per_group(received), self.kernel, "max"), window)
        return top_mask(torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf), count)

    def read(self, step: Step, total: int, kept: int) -> Tensor | None:
        """Return the ends and the best sentences, ``[G, total]``."""
        written = (step.added - 1) % self.sentence
        query = by_group(step.query[:, 0].float(), step.heads, "mean")
        if written > 0 and "query" in step.memory:
            query = query + step.memory["query"]
        step.memory["query"] = query
        able, sentence = step.memory["able"], step.memory["sentence"]
        if written < self.length_threshold or sentence.shape[-1] != total:
            return None
        first, local = fitting_ends(self.first, self.local, kept)
        local = max(0, local - step.added)
        ends = torch.ones(total, dtype=torch.bool, device=able.device)
        ends[first : total - local] = False
        likeness = torch.einsum("gd,gsd->gs", query / (written + 1), step.memory["means"])
        return ends | take_sentences(likeness, sentence.expand_as(able), able & ~ends, kept - first - local)


def split_into_sentences(entries: Entries, length: int) -> Tensor:
    """Number the sentences of a prompt: frames of videos, rows of images, and pieces of text.

    Args:
        entries: the prompt.
        length: tokens of a piece of text.

    Returns:
        int64 ``[n]``, ascending from 0.

    Example:
        >>> zeros = torch.zeros(1, 7, 2)
        >>> visual = torch.tensor([False, False, False, True, True, True, True])
        >>> split_into_sentences(Entries.of(zeros, zeros, visual=visual), 2).tolist()
        [0, 0, 1, 2, 2, 3, 3]
    """
    media, frame = entries.media, entries.frame
    starts = torch.ones_like(entries.visual)
    starts[1:] = (media[1:] != media[:-1]) | (frame[1:] != frame[:-1])
    run = starts.cumsum(dim=0) - 1
    size = run.bincount()[run]
    place = torch.arange(len(entries), device=run.device) - starts.nonzero().squeeze(-1)[run]
    last_frame = frame.new_zeros(int(media.max()) + 2).scatter_reduce(0, media + 1, frame, "amax")[media + 1]
    row = size.float().sqrt().ceil().long()
    width = torch.where(entries.visual, torch.where(last_frame > 0, size, row), length)
    return (place % width == 0).cumsum(dim=0) - 1


def take_sentences(likeness: Tensor, sentence: Tensor, able: Tensor, count: int) -> Tensor:
    """Take entries from the best sentence, then the second best, and so on, inside a sentence earliest first.

    Args:
        likeness: ``[G, S]``, how good each sentence is.
        sentence: int64 ``[G, n]``, the sentence of each entry.
        able: bool ``[G, n]``, entries that may be taken.
        count: how many to take; fewer where not as many may be.

    Returns:
        bool ``[G, n]``.

    Example:
        >>> sentence, able = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[True, True, False, True]])
        >>> take_sentences(torch.tensor([[1.0, 2.0]]), sentence, able, 2).tolist()
        [[True, False, False, True]]
    """
    order = torch.nan_to_num(likeness.float(), nan=-torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = order.argsort(dim=-1).gather(-1, sentence)
    # Stable: inside a sentence the order of the entries is left as it is.
    queue = rank.masked_fill(~able, likeness.shape[-1]).sort(dim=-1, stable=True).indices[:, : max(0, count)]
    return torch.zeros_like(able).scatter(-1, queue, True) & able
