"""ReKV: frames of a video, found again by the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import top_mask
from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.quest import PromptReader, check_count, means_by_label
from mmfast.registry import register


@register("rekv", stage="cache", paper="arXiv 2503.00540", source="Becomebright/ReKV", vectors=True)
@dataclass(frozen=True)
class ReKV(PromptReader):
    """Read the frames that fit the question best, and all text.

    Each frame (or image) is a block, in each layer for itself. A block is worth the dot product of its mean key with
    the mean query of the question, all heads together and without positions. The question is the text after the
    last image or video, or the last token where there is none; what it chooses is read in every step. Chosen frames
    stay at their positions; the official code moves them next to each other.

    Paper: "Streaming Video Question-Answering with In-context Video KV-Cache Retrieval", ICLR 2025.

    Attributes:
        keep: entries of the prompt to read, all text included, in whole blocks, cut off; at least the best block
            is read.
        chunk: frames that are judged and read together.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention", "rotation"})
    reads_question: ClassVar[bool] = True

    chunk: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("chunk", self.chunk)

    def study(self, entries: Entries, kept: int) -> None:
        """Choose once, and remember it ``[n]``."""
        if not bool(entries.visual.any()):
            return
        keys, query = entries.keys, entries.view.query
        if entries.rotation is not None:
            keys, query = entries.rotation.undo(keys), entries.rotation.undo(query)
        block = frame_blocks(entries)
        seen = entries.visual
        logits = block_logits(query[:, -max(1, entries.after_media) :], keys[:, seen], block[seen])
        room = kept - int((~seen).sum())
        chosen = self.blocks_that_fit(logits, block[seen].bincount(), room)
        entries.memory["chosen"] = ~seen | chosen[block]

    def blocks_that_fit(self, logits: Tensor, sizes: Tensor, room: int) -> Tensor:
        """Mark the best chunks of blocks, one after the other until one does not fit; at least one.

        Args:
            logits: ``[B]``, what each block is worth.
            sizes: int64 ``[B]``, entries of each block.
            room: entries to read.

        Returns:
            bool ``[B]``.

        Example:
            >>> ReKV().blocks_that_fit(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([4, 4, 4]), 9).tolist()
            [False, True, True]
        """
        means = chunk_means(logits, self.chunk)
        order = torch.nan_to_num(means, nan=-torch.inf).sort(descending=True, stable=True).indices
        chunk = torch.arange(len(logits), device=logits.device) // self.chunk
        filled = sizes.new_zeros(len(means)).scatter_add(0, chunk, sizes)[order].cumsum(dim=0)
        return best_blocks(logits, max(1, int((filled <= room).sum())), self.chunk)

    def read(self, step: Step, total: int, kept: int) -> Tensor | None:
        """Return what the question chose, ``[total]``."""
        chosen = step.memory.get("chosen")
        return chosen if chosen is not None and chosen.shape[-1] == total else None


def frame_blocks(entries: Entries) -> Tensor:
    """Number the frames and images of a prompt.

    Returns:
        int64 ``[n]``; the number of a text token is that of the frame before it, or 0.

    Example:
        >>> zeros, frame = torch.zeros(1, 4, 2), torch.tensor([0, 0, -1, 1])
        >>> frame_blocks(Entries.of(zeros, zeros, visual=frame >= 0, frame=frame)).tolist()
        [0, 0, 0, 1]
    """
    seen = entries.visual.nonzero().squeeze(-1)
    media, frame = entries.media[seen], entries.frame[seen]
    starts = torch.zeros_like(entries.visual)
    starts[seen[1:]] = (media[1:] != media[:-1]) | (frame[1:] != frame[:-1])
    return starts.cumsum(dim=0)


def block_logits(query: Tensor, keys: Tensor, block: Tensor) -> Tensor:
    """Multiply the mean query with the mean key of each block, all heads together.

    Args:
        query: ``[H, q, d]``, un-rotated.
        keys: ``[G, n, d]``, un-rotated.
        block: int64 ``[n]``, the block of each key, ascending from 0.

    Returns:
        float32 ``[B]``.

    Example:
        >>> block_logits(torch.ones(2, 1, 1), torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([0, 0, 1])).tolist()
        [4.0, 10.0]
    """
    means, _ = means_by_label(keys, block.expand(keys.shape[0], -1), int(block[-1]) + 1)
    grouped = rearrange(query.float().mean(dim=1), "(g r) d -> g r d", g=keys.shape[0]).sum(dim=1)
    return torch.einsum("gd,gbd->b", grouped, means)


def chunk_means(logits: Tensor, chunk: int) -> Tensor:
    """Average ``[B]`` logits over ``chunk`` neighbours; the last chunk may be shorter.

    Example:
        >>> chunk_means(torch.tensor([1.0, 3.0, 5.0]), 2).tolist()
        [2.0, 5.0]
    """
    missing = -len(logits) % chunk
    filled = functional.pad(logits.float(), (0, missing), value=torch.nan)
    return rearrange(filled, "(c s) -> c s", s=chunk).nanmean(dim=-1)


def best_blocks(logits: Tensor, count: int, chunk: int = 1) -> Tensor:
    """Mark the blocks of the ``count`` best chunks, bool ``[B]``.

    Example:
        >>> best_blocks(torch.tensor([1.0, 3.0, 5.0]), 1, chunk=2).tolist()
        [False, False, True]
    """
    means = torch.nan_to_num(chunk_means(logits, chunk), nan=-torch.inf)
    return top_mask(means, count).repeat_interleave(chunk)[: len(logits)]
