"""Quest: pages of the prompt, ranked by the largest logit they could give."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from mmfast.kv.base import Retriever, top_mask
from mmfast.kv.entries import Entries, Step
from mmfast.registry import register


@dataclass(frozen=True)
class PromptReader(Retriever):
    """Read a part of the prompt, and every entry that was stored after it.

    Subclasses look at the prompt in :meth:`study` and choose among its entries in :meth:`read`; layers that read
    everything, prompts that fit and later entries are dealt with here.
    """

    def prepare(self, entries: Entries) -> None:
        """Look at the prompt once, where it will not be read as a whole."""
        kept = self.keep_count(len(entries))
        if entries.layer >= self.dense_layers and kept < len(entries):
            self.study(entries, kept)

    def choose(self, step: Step) -> Tensor | None:
        """Choose what the new token reads; None = everything."""
        if step.layer < self.dense_layers:
            return None
        total = len(step) - step.added
        kept = self.keep_count(max(1, total))
        mask = None if kept >= total else self.read(step, total, kept)
        return None if mask is None else functional.pad(mask, (0, step.added), value=True)

    def study(self, entries: Entries, kept: int) -> None:
        """Write what :meth:`read` needs into ``entries.memory``; 1 <= kept < len(entries)."""

    @abstractmethod
    def read(self, step: Step, total: int, kept: int) -> Tensor | None:
        """Choose ``kept`` of the prompt's ``total`` entries.

        Returns:
            bool ``[total]``, ``[G, total]`` or ``[H, total]``; None = everything.
        """


@register("quest", stage="cache", paper="arXiv 2406.10774", source="mit-han-lab/Quest", vectors=True)
@dataclass(frozen=True)
class Quest(PromptReader):
    """Read the pages of the prompt that could hold the largest logits.

    The smallest and the largest value of every channel inside a page bound the logit of each of its keys from
    above. Query heads that share a key/value head read the same pages: those of the largest bound of any of them.
    The last, shorter page competes like the others. Entries generated after the prompt are always read.

    Paper: "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference".

    Attributes:
        keep: entries of the prompt to read, in whole pages, cut off.
        page_size: entries of a page.
        min_pages: pages that are read however small ``keep`` is.
    """

    page_size: int = 16
    min_pages: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("page_size", self.page_size)
        check_count("min_pages", self.min_pages)

    def study(self, entries: Entries, kept: int) -> None:
        """Remember the bounds of the pages, two ``[G, pages, d]`` tensors in the dtype of the keys."""
        lowest, highest = page_bounds(entries.keys, self.page_size)
        entries.memory.update(lowest=lowest, highest=highest)

    def read(self, step: Step, total: int, kept: int) -> Tensor | None:
        """Return the best pages, ``[G, total]``."""
        lowest, highest = step.memory["lowest"], step.memory["highest"]
        if lowest.shape[1] != -(-total // self.page_size):
            # Something evicted entries in between, and the pages are no longer what they were.
            lowest, highest = page_bounds(step.keys[:, :total], self.page_size)
        bounds = by_group(upper_bounds(step.query[:, 0], lowest, highest), step.heads, "max")
        return best_pages(bounds, max(self.min_pages, kept // self.page_size), self.page_size, total)


def page_bounds(keys: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each channel in each page.

    Args:
        keys: ``[G, n, d]``.
        page_size: entries of a page; the last may be shorter.

    Returns:
        Two tensors ``[G, pages, d]`` in the dtype of the keys.

    Example:
        >>> [bound.tolist() for bound in page_bounds(torch.tensor([[[1.0], [3.0], [2.0]]]), 2)]
        [[[[1.0], [2.0]]], [[[3.0], [2.0]]]]
    """
    pages = rearrange(padded(keys, page_size), "g (p s) d -> g p s d", s=page_size)
    return pages.amin(dim=2), pages.amax(dim=2)


def padded(keys: Tensor, size: int) -> Tensor:
    """Repeat the last entry of ``[G, n, d]`` until n is a multiple of ``size``."""
    total = keys.shape[1]
    places = torch.arange(-(-total // size) * size, device=keys.device)
    return keys[:, places.clamp(max=total - 1)]


def upper_bounds(query: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Bound the dot product of a query with any key of a page.

    Args:
        query: ``[H, d]``.
        lowest: ``[G, pages, d]``.
        highest: ``[G, pages, d]``.

    Returns:
        float32 ``[H, pages]``, the sum over channels of the larger of the two products.

    Example:
        >>> upper_bounds(torch.tensor([[1.0, -1.0]]), torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[1.0, 3.0]]]))
        tensor([[-1.]])
    """
    grouped = rearrange(query.float(), "(g r) d -> g r d", g=lowest.shape[0])
    above = grouped.clamp(min=0.0) @ highest.float().mT
    below = grouped.clamp(max=0.0) @ lowest.float().mT
    return rearrange(above + below, "g r p -> (g r) p")


def best_pages(scores: Tensor, count: int, page_size: int, total: int) -> Tensor:
    """Mark the entries of the ``count`` best pages.

    Args:
        scores: ``[..., pages]``.
        count: pages; all of them where there are fewer.
        page_size: entries of a page.
        total: entries n; the last page may be shorter.

    Returns:
        bool ``[..., n]``.

    Example:
        >>> best_pages(torch.tensor([1.0, 3.0, 2.0]), 1, 2, 5).tolist()
        [False, False, True, True, False]
    """
    pages = top_mask(torch.nan_to_num(scores.float(), nan=-torch.inf), count)
    return pages.repeat_interleave(page_size, dim=-1)[..., :total]


def means_by_label(states: Tensor, labels: Tensor, count: int, able: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Average the entries of each head that carry the same label.

    Args:
        states: ``[G, n, d]``.
        labels: int64 ``[G, n]``, each below ``count``.
        count: number of labels S.
        able: bool ``[G, n]``, entries that count; None = all.

    Returns:
        float32 ``[G, S, d]``, zeros for labels without entries, and float32 ``[G, S]`` number of entries.

    Example:
        >>> means, counts = means_by_label(torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[0, 0, 2]]), 3)
        >>> means[0, :, 0].tolist(), counts.tolist()
        ([2.0, 0.0, 5.0], [[2.0, 0.0, 1.0]])
    """
    # A product adds up in the same order every time, which scattering on a GPU does not.
    finite = torch.nan_to_num(states.float(), posinf=0.0, neginf=0.0)
    names = torch.arange(count, device=labels.device)[:, None]
    sums, counts = [], []
    for head, own in enumerate(labels):
        members = own == names if able is None else (own == names) & able[head]
        sums.append(members.float() @ finite[head])
        counts.append(members.sum(dim=-1).float())
    sizes = torch.stack(counts)
    return torch.stack(sums) / sizes.clamp(min=1)[..., None], sizes


def by_group(scores: Tensor, heads: int, reduce: Literal["mean", "max"]) -> Tensor:
    """Reduce ``[H, ...]`` over the query heads that share one of ``heads`` key/value heads, to ``[G, ...]``.

    Example:
        >>> by_group(torch.tensor([[1.0], [3.0]]), 1, "max").tolist()
        [[3.0]]
    """
    grouped = rearrange(scores, "(g r) ... -> g r ...", g=heads)
    return grouped.amax(dim=1) if reduce == "max" else grouped.mean(dim=1)


def check_count(field: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``.

    Raises:
        ValueError: naming the field and the value.

    Example:
        >>> check_count("page_size", 0)
        Traceback (most recent call last):
        ValueError: page_size=0 must be an int of at least 1
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{field}={value!r} must be an int of at least {least}")
